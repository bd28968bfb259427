"""A loaded model that answers requests of lmms-eval: batches, counts, settings, refusals."""

from __future__ import annotations

import av
import pytest
from lmms_eval.api.instance import Instance
from lmms_eval.models.model_utils.gen_metrics import (
    get_logged_metrics_history,
    reset_logged_metrics,
)

import vtprune
from vtprune import InputError, UnsupportedError
from vtprune.eval import scenes, shipped
from vtprune.eval.lmms_chat import PADDING, Chat
from vtprune.eval.lmms_prompts import cut, settings_for

TASK, SPLIT = "pictures", "test"
GREEDY = {"max_new_tokens": 4, "do_sample": False, "temperature": 0.0, "until": ["\n\n"]}
KINDS = ((1, "how many digits ?"), (0, "which digit is red ?"), (2, "what is there ?"))


def picture(number):
    return scenes.make_scene(number).image


def docs(n):
    """Documents with one, no and two images in turn."""
    found = []
    for i in range(n):
        images, text = KINDS[i % 3]
        found.append({"images": [picture(10 * i + j) for j in range(images)], "text": text})
    return found


def talk(doc):
    content = [{"type": "image", "url": image} for image in doc["images"]]
    return [{"role": "user", "content": [*content, {"type": "text", "text": doc["text"]}]}]


def request(doc_id, settings=GREEDY, ask=talk, **more):
    return Instance(
        "generate_until",
        ("", ask, dict(settings), doc_id, TASK, SPLIT),
        0,
        {"task": TASK, "doc_id": doc_id, "repeats": 1, **more},
    )


@pytest.fixture
def chat(loaded):
    """Makes a model to ask, with so many documents."""

    def make(size, n=6, strategy=None, keep=0.25):
        model, processor = loaded
        made = Chat(model, processor, size)
        made.task_dict = {TASK: {SPLIT: docs(n)}}
        if strategy:
            made.wrapping = lambda _: vtprune.wrap(model, strategy, keep=keep)
        return made

    reset_logged_metrics()
    return make


def told(results):
    counts = [result.token_counts for result in results]
    return [(r.text, c.input_tokens, c.output_tokens) for r, c in zip(results, counts, strict=True)]


@pytest.mark.parametrize("strategy", [None, "hiprune", "fastv"])
def test_a_batch_of_three_answers_as_each_alone_and_in_order(chat, strategy):
    longer = {**GREEDY, "max_new_tokens": 6}
    requests = [request(i, longer if i in (1, 4) else GREEDY) for i in (3, 1, 0, 4, 2, 5)]
    alone, together = chat(1, strategy=strategy), chat(3, strategy=strategy)
    wanted = told(alone.generate_until(requests))
    assert told(together.generate_until(requests)) == wanted
    assert len({text for text, *_ in wanted}) > 1
    assert {length for _, _, length in wanted} == {4, 6}
    assert [batch.size for batch in together.batches] == [3, 1, 2]
    assert together.batches[0].first == 3
    assert together.replies.keys() == {(TASK, i) for i in range(6)}


def test_counts_are_those_of_the_prompts(chat, loaded):
    _, processor = loaded
    pruned, whole = chat(3, strategy="hiprune"), chat(3)
    few, all_of_them = pruned.generate_until, whole.generate_until
    requests = [request(i) for i in range(3)]
    for before, after, (images, text) in zip(
        all_of_them(requests), few(requests), KINDS, strict=True
    ):
        words = processor.apply_chat_template(
            [{"role": "user", "content": [{"type": "text", "text": text}]}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
        )
        n = len(words["input_ids"][0])
        assert before.token_counts.input_tokens == n + 256 * images
        assert after.token_counts.input_tokens == n + 64 * images
    kept = [pruned.replies[TASK, i] for i in range(3)]
    assert [(reply.tokens, reply.kept) for reply in kept] == [(256, 64), (0, 0), (512, 128)]
    assert kept[0].flops < 1
    assert [whole.replies[TASK, i].kept for i in range(3)] == [256, 0, 512]


def test_answers_are_those_of_the_wrapped_model(chat, loaded):
    model, processor = loaded
    asked = chat(2, strategy="hiprune")
    found = asked.generate_until([request(2)])[0].text
    content = [{"type": "image", "image": picture(20 + j)} for j in range(2)]
    message = {"role": "user", "content": [*content, {"type": "text", "text": KINDS[2][1]}]}
    inputs = processor.apply_chat_template(
        [message],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    with vtprune.wrap(model, "hiprune", keep=0.25):
        ids = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    assert found == processor.batch_decode(ids[:, -4:], skip_special_tokens=True)[0]


def test_padding_is_neither_run_nor_counted(chat):
    asked = chat(2, strategy="hiprune")
    padding = request(0, **{PADDING: True})
    results = asked.generate_until([request(0), request(3), padding])
    assert results[2].text == ""
    assert results[2].token_counts is None
    assert sum(batch.size for batch in asked.batches) == 2
    (logged,) = get_logged_metrics_history()
    assert logged["total_requests"] == 2
    assert (logged["visual_tokens"], logged["kept_tokens"]) == (256, 64)
    times = (logged["score_ms"], logged["prefill_ms"], logged["first_token_ms"])
    assert all(ms > 0 for ms in times)
    assert logged["prefill_ms"] < logged["first_token_ms"]
    assert logged["first_token_ms"] < 1000 * logged["total_elapsed_time"] / 2
    assert asked.generate_until([padding])[0].text == ""
    assert len(get_logged_metrics_history()) == 1


def test_the_unpruned_model_scores_nothing(chat):
    chat(1).generate_until([request(0)])
    (logged,) = get_logged_metrics_history()
    assert logged["score_ms"] == 0
    assert logged["kept_tokens"] == 256


def test_blind_requests_hold_no_image(chat):
    asked = chat(3)
    asked.blind = True
    asked.generate_until([request(0), request(2)])
    assert {reply.tokens for reply in asked.replies.values()} == {0}


def test_it_can_be_asked_again_after_it_was_cleaned(chat):
    asked = chat(2)
    first = asked.generate_until([request(0)])
    asked.clean()
    assert told(asked.generate_until([request(0)])) == told(first)


@pytest.mark.parametrize("strategy", [None, "hiprune"])
def test_stops_end_an_answer(chat, strategy):
    long = {**GREEDY, "max_new_tokens": 8}
    whole = chat(1, strategy=strategy).generate_until([request(0, long)])[0]
    wanted, second, *_ = whole.text.split()
    stop = f" {second}"
    asked = chat(2, strategy=strategy)
    requests = [request(i, {**long, "until": [stop, "\n\n"]}) for i in (0, 3)]
    stopped = asked.generate_until(requests)[0]
    assert stopped.text == wanted
    assert stopped.token_counts.input_tokens == whole.token_counts.input_tokens
    alone = chat(1, strategy=strategy).generate_until(requests[:1])[0]
    assert alone.text == wanted
    assert alone.token_counts.output_tokens == 2


def test_settings_of_a_task_are_those_of_generate():
    settings, stops = settings_for({**GREEDY, "image_aspect_ratio": "original", "num_beams": 1})
    greedy = {"temperature": None, "top_p": None, "top_k": None, "do_sample": False}
    assert settings == {"max_new_tokens": 4, "num_beams": 1, **greedy}
    assert stops == []
    settings, stops = settings_for({"until": ["A:", "\n\n", ""], "temperature": 0.7, "top_p": 0.9})
    assert settings == {
        "max_new_tokens": 1024,
        "temperature": 0.7,
        "top_p": 0.9,
        "do_sample": True,
    }
    assert stops == ["A:"]
    assert settings_for({"temperature": 0.7, "do_sample": False})[0]["temperature"] is None
    assert not settings_for({"until": None})[0]["do_sample"]
    assert cut("yes B: A: no", ["A:", "B:"]) == "yes "
    assert cut("yes", ["A:"]) == "yes"
    with pytest.raises(UnsupportedError, match="generation_kwargs seed, visual_cot are not known"):
        settings_for({"seed": 1, "visual_cot": True})


@pytest.mark.parametrize("kind", ["audio", "video"])
def test_what_the_model_does_not_take_is_refused(chat, kind):
    def ask(doc):
        return [{"role": "user", "content": [{"type": kind, "url": "clip.mp4"}]}]

    with pytest.raises(UnsupportedError, match=f"holds {kind}, which .* it takes text, image"):
        chat(1).generate_until([request(0, ask=ask)])


VIDEO = (
    "{% for m in messages %}{% for c in m['content'] %}{% if c['type'] == 'video' %}"
    "<|vision_start|><|video_pad|><|vision_end|>{% elif c['type'] == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ c['text'] }}{% endif %}"
    "{% endfor %}{% endfor %}"
)


@pytest.fixture(scope="module")
def qwen():
    return shipped.load("mini-qwen")


def asked_of(qwen, doc_to_messages, **options):
    """Returns what became of one request to a Qwen2.5-VL of which a quarter of the tokens stay."""
    model, processor = qwen
    made = Chat(model, processor, 1, options)
    made.task_dict = {TASK: {SPLIT: docs(1)}}
    made.wrapping = lambda _: vtprune.wrap(model, "divprune", keep=0.25)
    made.generate_until([request(0, ask=doc_to_messages)])
    return made.replies[TASK, 0]


def test_videos_are_shown_in_frames(qwen, tmp_path, monkeypatch):
    clip = str(tmp_path / "clip.mp4")
    with av.open(clip, "w") as file:
        stream = file.add_stream("mpeg4", rate=8)
        stream.width = stream.height = 128
        stream.pix_fmt = "yuv420p"
        for number in range(6):
            frame = av.VideoFrame.from_image(picture(number))
            file.mux(stream.encode(frame))
        file.mux(stream.encode())

    def ask(doc):
        parts = [{"type": "video", "url": clip}, {"type": "text", "text": "which digit is red ?"}]
        return [{"role": "user", "content": parts}]

    with pytest.raises(InputError, match=r"Qwen2_5_VLProcessor cannot take a request: .*video_pad"):
        asked_of(qwen, ask)  # its own template leaves videos out
    monkeypatch.setattr(qwen[1], "chat_template", VIDEO)
    # Two frames make a step in time, and 128 x 128 pixels 256 tokens.
    four = asked_of(qwen, ask, num_frames=4)
    assert (four.tokens, four.kept) == (2 * 256, 2 * 64)
    assert asked_of(qwen, ask).tokens == 3 * 256


def test_images_can_be_made_smaller(qwen):
    assert asked_of(qwen, talk).tokens == 256
    few = asked_of(qwen, talk, min_pixels=1024, max_pixels=64 * 64)
    assert (few.tokens, few.kept) == (64, 16)


def test_rounds_are_asked_until_the_task_ends_them(chat):
    seen = []

    def ask(doc, round_idx=0, previous_output=None, previous_round_info=None):
        seen.append((round_idx, previous_output, previous_round_info))
        if round_idx == 0:
            return talk(doc)
        return talk({**doc, "text": "which shape is red ?"}), round_idx == 2, None, {"n": round_idx}

    asked = chat(1, strategy="hiprune")
    (answers,) = asked.generate_until_multi_round([request(0, ask=ask)])
    assert seen == [(0, None, None), (1, answers[:1], None), (2, answers, {"n": 1})]
    single = asked.generate_until([request(0)])[0].text
    assert answers[0] == single
    assert asked.generate_until_multi_round([request(0, ask=talk_once)]) == [[single]]


def talk_once(doc, **_):
    return talk(doc)


def test_rounds_without_an_end_are_refused(chat, monkeypatch):
    monkeypatch.setattr("vtprune.eval.lmms_chat.ROUNDS", 3)

    def ask(doc, **rounds):
        return (talk(doc), False, None, None) if rounds else talk(doc)

    with pytest.raises(UnsupportedError, match="not ended a conversation after 3 rounds"):
        chat(1).generate_until_multi_round([request(1, ask=ask)])


def test_likelihoods_are_refused(chat):
    with pytest.raises(UnsupportedError, match="generate_until"):
        chat(1).loglikelihood([])
