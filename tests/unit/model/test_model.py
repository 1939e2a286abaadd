"""The public model: streams, statistics, options."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from streams import BUDGET, PATIENCE_S, PROMPT, text, tokens

import edgelm
from edgelm import Model


def test_statistics_add_up(model: Model) -> None:
    chunks = list(model.stream(PROMPT, max_tokens=9, ignore_eos=True))
    last = chunks[-1]
    usage = last.usage
    assert (last.finish_reason, last.token_id) == ("length", None)
    assert all(chunk.finish_reason is None for chunk in chunks[:-1])
    assert [chunk.usage.completion_tokens for chunk in chunks] == [*range(1, 10), 9]
    assert usage.prompt_tokens == len(model.tokenizer.encode(PROMPT))
    assert usage.cached_tokens == 0
    assert 0 < usage.ttft_s < PATIENCE_S
    assert usage.prefill_tps > 0
    assert usage.decode_tps > 0
    assert 0 < usage.rss_bytes <= usage.peak_bytes <= usage.budget_bytes == BUDGET == model.plan.budget_bytes
    assert usage.bytes_streamed == 0
    assert usage.wait_s == usage.read_s == 0  # everything is resident
    assert 0 < usage.sample_s < usage.compute_s
    assert usage.ttft_s < usage.elapsed_s
    assert usage.predicted_decode_tps == model.plan.predicted_decode_tps > 0
    assert usage.backend == model.backend == "numpy"
    assert all(chunk.usage.other_s > 0 for chunk in chunks)
    assert chunks[0].usage.decode_tps == 0
    assert any("chosen" in note for note in model.notes)


def test_the_pass_that_ends_an_answer_is_in_its_times(model: Model) -> None:
    """The end token is computed and never yielded."""
    first = next(chunk.token_id for chunk in model.stream(PROMPT, max_tokens=1, ignore_eos=True))
    assert first is not None
    model.tokenizer.eos_ids = frozenset({first})  # type: ignore[misc]
    (last,) = model.stream(PROMPT)
    assert (last.finish_reason, last.usage.completion_tokens) == ("stop", 0)
    assert last.usage.other_s > 0


def test_a_recording_holds_the_tokens_of_a_stream(model: Model) -> None:
    with model.record() as timeline:
        list(model.stream(PROMPT, max_tokens=5, ignore_eos=True))
    model.generate(PROMPT, max_tokens=3)  # not in it any more
    kinds = [event.kind for event in timeline.events()]
    assert (kinds.count("token"), kinds.count("sample")) == (5, 5)
    assert kinds.index("compute") < kinds.index("token")


def test_max_tokens_is_exact_and_the_context_ends_a_stream(model: Model) -> None:
    assert len(tokens(list(model.stream(PROMPT, max_tokens=1, ignore_eos=True)))) == 1
    chunks = list(model.stream(PROMPT, ignore_eos=True))
    # the last token is sampled, not stored
    assert len(tokens(chunks)) == 128 - chunks[-1].usage.prompt_tokens + 1
    assert chunks[-1].finish_reason == "length"


def test_the_same_prompt_goes_on_from_the_cache_with_the_same_answer(model: Model) -> None:
    first = list(model.stream(PROMPT, max_tokens=8, ignore_eos=True))
    again = list(model.stream(PROMPT, max_tokens=8, ignore_eos=True))
    assert tokens(again) == tokens(first)
    assert again[-1].usage.cached_tokens == again[-1].usage.prompt_tokens - 1
    assert model.generate(PROMPT, max_tokens=8, ignore_eos=True) == text(first)


def test_stop_strings_end_the_text_before_them(model: Model) -> None:
    whole = model.generate(PROMPT, max_tokens=30, ignore_eos=True)
    stop = whole[10:13]
    chunks = list(model.stream(PROMPT, max_tokens=30, ignore_eos=True, stop=stop))
    assert text(chunks) == whole[: whole.index(stop)]
    assert chunks[-1].finish_reason == "stop"
    assert model.generate(PROMPT, max_tokens=30, ignore_eos=True, stop=["not there", stop]) == text(chunks)


def test_an_end_token_ends_the_answer_unless_ignored(model: Model) -> None:
    (eos, *_) = model.tokenizer.eos_ids
    bias = {eos: 1000.0}
    chunks = list(model.stream(PROMPT, max_tokens=5, logit_bias=bias))
    assert tokens(chunks) == []
    assert (chunks[-1].finish_reason, text(chunks)) == ("stop", "")
    chunks = list(model.stream(PROMPT, max_tokens=5, logit_bias=bias, ignore_eos=True))
    assert tokens(chunks) == [eos] * 5
    assert chunks[-1].finish_reason == "length"


def test_seeds_repeat_and_differ(model: Model) -> None:
    def drawn(seed: int) -> list[int]:
        return tokens(list(model.stream(PROMPT, max_tokens=20, ignore_eos=True, temperature=2.0, seed=seed)))

    assert drawn(1) == drawn(1)
    assert drawn(1) != drawn(2)


def test_processors_see_the_history_and_change_the_logits(model: Model) -> None:
    seen: list[int] = []

    def only_seven(history: Any, logits: Any) -> Any:
        seen.append(len(history))
        logits = np.full_like(logits, -np.inf)
        logits[7] = 0
        return logits

    chunks = list(model.stream(PROMPT, max_tokens=4, ignore_eos=True, processors=[only_seven]))
    assert tokens(chunks) == [7] * 4
    n_prompt = chunks[-1].usage.prompt_tokens
    assert seen == [n_prompt, n_prompt + 1, n_prompt + 2, n_prompt + 3]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"max_tokens": 0}, "max_tokens"),
        ({"timeout_s": 0}, "timeout_s"),
        ({"temprature": 1}, "known: "),
        ({"stop": ""}, "stop string"),
        ({"temperature": -1}, "temperature"),
    ],
)
def test_mistakes_are_told_at_the_call(model: Model, options: dict[str, Any], said: str) -> None:
    with pytest.raises(edgelm.ConfigError, match=said):
        model.stream(PROMPT, **options)
    assert model.generate(PROMPT, max_tokens=2) is not None


def test_an_empty_prompt_and_foreign_ids_are_refused(model: Model) -> None:
    with pytest.raises(edgelm.ConfigError, match="empty"):
        model.stream_ids([])
    with pytest.raises(edgelm.ConfigError, match="token ids"):
        list(model.stream_ids([5, 10**6]))


def test_a_prompt_longer_than_the_context_names_both_numbers(model: Model) -> None:
    with pytest.raises(edgelm.ContextOverflow) as caught:
        list(model.stream_ids([5] * 128))
    assert (caught.value.n_prompt_tokens, caught.value.n_context) == (128, 128)
    assert list(model.stream_ids([5] * 127, max_tokens=1))[-1].finish_reason in ("length", "stop")
