from __future__ import annotations

import io
from importlib import import_module, metadata
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from vtprune.errors import ConfigError
from vtprune.eval import doctor, shipped
from vtprune.eval import doctor_dependencies as needs
from vtprune.eval import doctor_probes as probes
from vtprune.eval.doctor_dependencies import ELSEWHERE, MISSING, OK, WRONG
from vtprune.eval.doctor_probes import Finding

ELSEWHERE_MARKER = "platform_system == 'Nowhere'"
# What build back ends make of an extra that names others: its requirements, or the names alone.
PLAIN = [
    "torch<3,>=2",
    "rich>=13; extra == 'eval'",
    "torchvision; extra == 'eval'",
    "timm>=1; extra == 'vit'",
    f"triton>=3; ({ELSEWHERE_MARKER}) and extra == 'kernels'",
    "pytest>=8; extra == 'dev'",
]
RESOLVED = [
    *("rich>=13; extra == 'dev'", "torchvision; extra == 'dev'", "rich>=13; extra == 'all'"),
    *("torchvision; extra == 'all'", "timm>=1; extra == 'all'"),
    f"triton>=3; ({ELSEWHERE_MARKER}) and extra == 'all'",
]
BY_NAME = ["vtprune[eval]; extra == 'dev'", "vtprune[eval,kernels,vit]; extra == 'all'"]
INSTALLED = {"torch": "2.15.0+cpu", "rich": "15.0", "torchvision": "0.29", "pytest": "8.0rc1"}


@pytest.fixture(autouse=True)
def whole(monkeypatch):
    monkeypatch.setattr(shipped, "verify", lambda name: None, raising=False)


@pytest.fixture
def install(monkeypatch):
    """Makes the metadata say that vtprune has these requirements, and what is installed."""

    def say(requires, installed):
        def version(name):
            if name not in installed:
                raise metadata.PackageNotFoundError(name)
            return installed[name]

        monkeypatch.setattr(needs.metadata, "requires", lambda name: requires)
        monkeypatch.setattr(needs.metadata, "version", version)

    return say


@pytest.fixture
def broken(monkeypatch):
    """Makes the import of modules raise an error, or return what is given instead of them."""

    def replace(**modules):
        def load(name):
            found = modules.get(name)
            if isinstance(found, BaseException):
                raise found
            return found or import_module(name)

        monkeypatch.setattr(probes, "import_module", load)

    return replace


def named(findings):
    return {finding.name: finding for finding in findings}


def text_of(report, width=80):
    console = Console(file=io.StringIO(), width=width)
    console.print(doctor.render(report))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def report_of(**parts):
    empty = dict.fromkeys(("versions", "dependencies", "devices", "backends", "models"), ())
    return doctor.Report(**{**empty, **parts})


def test_the_report_covers_every_extra_and_model():
    report = doctor.examine()
    extras = set(metadata.metadata("vtprune").get_all("Provides-Extra") or ())
    assert {d.group for d in report.dependencies} == {"core", *extras} - {"all"}
    assert {d.group: d.status for d in report.dependencies if d.name == "torch"} == {"core": OK}
    assert [finding.name for finding in report.models] == shipped.names()
    assert {"cpu", "cuda", "xpu", "mps"} == {f.name.partition(":")[0] for f in report.devices}
    assert f"{torch.get_num_threads()} threads" in named(report.devices)["cpu"].note
    assert named(report.backends)["torch"] == Finding("torch", True, torch.__version__)
    assert "math" in named(report.backends)["SDPA"].note


@pytest.mark.parametrize("requires", [PLAIN + RESOLVED, PLAIN + BY_NAME])
def test_a_requirement_is_listed_once(install, requires):
    install(requires, INSTALLED)
    assert [(d.group, d.wanted, d.installed, d.status) for d in needs.dependencies()] == [
        ("core", "torch<3,>=2", "2.15.0+cpu", OK),
        ("eval", "rich>=13", "15.0", OK),
        ("eval", "torchvision", "0.29", OK),
        ("dev", "pytest>=8", "8.0rc1", WRONG),
        ("kernels", "triton>=3", None, ELSEWHERE),
        ("vit", "timm>=1", None, MISSING),
    ]


def test_versions_that_cannot_be_read_are_wrong(install):
    install(["a>=1", "b", "c"], {"a": "one", "b": None, "c": "1.0.dev1"})
    assert [d.status for d in needs.dependencies()] == [WRONG, MISSING, OK]


def test_without_metadata_vtprune_itself_is_missing(monkeypatch):
    def absent(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(needs.metadata, "requires", absent)
    monkeypatch.setattr(needs.metadata, "version", absent)
    report = report_of(dependencies=needs.dependencies())
    assert [problem.command for problem in report.problems] == ["pip install vtprune"]
    assert report.broken


@pytest.mark.parametrize(
    ("requirement", "what", "command", "required"),
    [
        ("timm>=1; extra == 'vit'", "vit: timm>=1 (missing)", "'vtprune[vit]'", False),
        ("rich>=99; extra == 'dev'", "dev: rich>=99 (15.0 is installed)", "'vtprune[dev]'", False),
        (
            "rich>=99; extra == 'eval'",
            "eval: rich>=99 (15.0 is installed)",
            "'vtprune[eval]'",
            True,
        ),
        ("timm>=1; extra == 'eval'", "eval: timm>=1 (missing)", "'vtprune[eval]'", True),
        ("timm", "core: timm (missing)", "vtprune", True),
    ],
)
def test_what_is_missing_comes_with_its_command(install, requirement, what, command, required):
    install([requirement], INSTALLED)
    report = report_of(dependencies=needs.dependencies())
    assert report.problems == (doctor.Problem(what, f"pip install {command}", required),)
    assert report.broken == required
    assert f"{what}\n    pip install {command}\n" in text_of(report)


def test_what_is_for_another_platform_is_no_problem(install):
    install([f"triton; {ELSEWHERE_MARKER}"], {})
    assert not report_of(dependencies=needs.dependencies()).problems


def test_a_damaged_model_is_an_error(monkeypatch):
    def damaged(name):
        raise ConfigError("model.safetensors is not the file that was shipped.\nmore")

    monkeypatch.setattr(shipped, "verify", damaged)
    report = report_of(models=probes.models())
    assert report.broken
    assert report.problems[0].what == (
        f"{shipped.names()[0]}: model.safetensors is not the file that was shipped."
    )
    assert report.problems[0].command.endswith(" vtprune")


@pytest.mark.parametrize(
    ("version", "command"),
    [
        ("2.15.0", "pip install torchvision torch==2.15.0"),
        ("2.15.0a0+git1", "pip install torchvision torch==2.15.0a0"),
        (
            "2.15.0+cpu",
            "pip install torchvision torch==2.15.0 \\\n  -i https://download.pytorch.org/whl/cpu",
        ),
    ],
)
def test_a_broken_torchvision_is_reported_with_the_build_that_fits(
    install, broken, version, command
):
    install(PLAIN, {**INSTALLED, "timm": "1"})
    error = RuntimeError("operator torchvision::nms does not exist\nat line 1")
    broken(torch=SimpleNamespace(__version__=version), torchvision=error)
    backends = probes.backends()
    found = named(backends)["torchvision"]
    assert found == Finding("torchvision", False, "operator torchvision::nms does not exist")
    report = report_of(dependencies=needs.dependencies(), backends=backends)
    assert report.problems[0].command == f"pip uninstall -y torchvision\n{command}"
    assert report.broken
    lines = text_of(report).splitlines()
    assert all(f"    {line}" in lines for line in report.problems[0].command.splitlines())


def test_one_cause_is_one_problem(install):
    install(PLAIN, INSTALLED)
    same = [Finding(name, False, "no such operator") for name in ("torch", "torchvision")]
    report = report_of(
        dependencies=needs.dependencies(),
        backends=(*same, Finding("triton", False, "needs a GPU")),
        models=(Finding("loader", False, "no such operator"),),
    )
    errors = [problem for problem in report.problems if problem.required]
    assert [problem.what for problem in errors] == ["torch: no such operator"]


def test_an_import_error_tells_its_cause(broken):
    error = ImportError("Could not import module 'AutoProcessor'.")
    error.__cause__ = RuntimeError("no such operator")
    broken(transformers=error)
    assert named(probes.backends())["transformers"].note == "no such operator"


def test_nothing_is_raised_when_everything_is_broken(monkeypatch):
    def fail(*args):
        raise OSError

    monkeypatch.setattr(probes, "import_module", fail)
    monkeypatch.setattr(shipped, "names", fail)
    report = doctor.examine()
    assert report.broken
    findings = (*report.devices, *report.backends, *report.models)
    assert {(finding.works, finding.note) for finding in findings} == {(False, "OSError")}
    assert "Something required is wrong." in text_of(report)


def test_why_there_is_no_gpu(monkeypatch):
    def no_driver():
        raise RuntimeError("Found no NVIDIA driver on your system.")

    monkeypatch.setattr(torch.cuda, "init", no_driver)
    monkeypatch.setattr(torch.version, "cuda", "13.2")
    assert named(probes.devices())["cuda"].note == "Found no NVIDIA driver on your system."
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.version, "hip", None)
    assert named(probes.devices())["cuda"].note == "this torch is built without CUDA"


def test_each_gpu_is_described_and_tried(monkeypatch):
    def compute(device, note):
        if device == "cuda:1":
            raise RuntimeError("no kernel image is available\nmore")
        return note

    gpu = SimpleNamespace(name="NVIDIA H200", major=9, minor=0, total_memory=150 * 2**30)
    monkeypatch.setattr(torch.version, "cuda", "13.2")
    monkeypatch.setattr(torch.cuda, "init", lambda: None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i: gpu)
    monkeypatch.setattr(probes, "_compute", compute)
    found = named(probes.devices())
    assert found["cuda:0"].note == "NVIDIA H200, capability 9.0, 150.0 GiB"
    assert found["cuda:1"] == Finding("cuda:1", False, "no kernel image is available")


def test_triton_needs_a_gpu(broken, monkeypatch):
    target = SimpleNamespace(backend="cuda", arch=90)
    active = SimpleNamespace(get_current_target=lambda: target)
    runtime = SimpleNamespace(driver=SimpleNamespace(active=active))
    broken(triton=SimpleNamespace(__version__="3.9.0", runtime=runtime))
    monkeypatch.setattr(torch.xpu, "is_available", lambda: False)
    for gpu, note in ((False, "3.9.0 imports, but needs a GPU"), (True, "3.9.0 for cuda 90")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda gpu=gpu: gpu)
        assert named(probes.backends())["triton"] == Finding("triton", gpu, note)


def test_flash_attention_must_suit_transformers(broken):
    module = SimpleNamespace(__version__="2.0")
    for suits, note in (
        (False, "2.0 imports, but transformers does not use it here"),
        (True, "2.0"),
    ):
        broken(
            **{
                "flash_attn": module,
                "transformers.utils": SimpleNamespace(is_flash_attn_2_available=lambda s=suits: s),
            }
        )
        assert named(probes.backends())["flash-attn"] == Finding("flash-attn", suits, note)


def test_sdpa_without_kernels_does_not_work(broken):
    off = {f"{kind}_sdp_enabled": bool for kind in ("flash", "mem_efficient", "cudnn", "math")}
    cuda = SimpleNamespace(**off)
    fake = SimpleNamespace(__version__="2", backends=SimpleNamespace(cuda=cuda))
    broken(torch=fake)
    assert named(probes.backends())["SDPA"] == Finding("SDPA", False, "every kind is disabled")


def test_the_page_is_plain_text_of_80_columns(install):
    install(PLAIN, INSTALLED)
    note = "[red]no[/red] [/] " + "https://example.org/" + 30 * "long/"
    report = report_of(
        versions=(("vtprune", "0.1.0"), ("on", "Linux" + 30 * "-long")),
        dependencies=needs.dependencies(),
        devices=(Finding("cuda", False, note),),
        models=(Finding("m" * 90, False, note),),
    )
    text = text_of(report)
    assert max(map(len, text.splitlines())) <= 80
    assert "\x1b" not in text and "…" not in text
    assert text.count("[red]no[/red] [/]") == 3
    for word in ("extra", "requirement", "missing", "wrong version", "not for this platform"):
        assert word in text
    assert text.count("Error: ") == 1 and text.count("Optional: ") == 2


def test_a_sound_report_says_so():
    assert "All that is required is here." in text_of(report_of())
    assert not report_of().broken
