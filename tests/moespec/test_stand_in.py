"""A request's own drafter: the text stays the target's, and the engine's drafter has its place back afterwards."""

from __future__ import annotations

import pytest

from moespec import EMBEDDED_TARGET, Engine, GenerationConfig, NgramDrafter, Request, TreeConfig

PROMPT = "Tell me a short story about a fox."
GENERATION = GenerationConfig(max_new_tokens=40, ignore_eos=True)


@pytest.fixture(scope="module")
def engine():
    return Engine.from_pretrained(EMBEDDED_TARGET)


def written(engine: Engine, *requests: Request) -> list[list]:
    found: list[list] = [[] for _ in requests]
    for number, step in engine.generate_batch(requests):
        found[number].append(step)
    return found


def with_ngram(prompt) -> Request:
    return Request(prompt, GENERATION, drafter=NgramDrafter())


def test_the_text_is_the_targets_own_and_the_guesses_are_the_guests(engine):
    (plain,) = written(engine, Request(PROMPT, GENERATION, tree=TreeConfig(1)))
    (guessed,) = written(engine, with_ngram(PROMPT))
    assert guessed[-1].summary.token_ids == plain[-1].summary.token_ids
    trees = [step.tree for step in guessed if step.kind == "tree"]
    known = set(plain[-1].summary.prompt_token_ids + plain[-1].summary.token_ids)
    assert trees and all(set(tree.token_ids) <= known for tree in trees), "it only repeats what it has read"


def test_the_engines_own_drafter_goes_on_as_if_it_had_never_left(engine):
    (first,) = written(engine, with_ngram(PROMPT))
    both = first[-1].summary.prompt_token_ids + first[-1].summary.token_ids
    (again,) = written(engine, Request(both, GENERATION))
    engine.forget()
    (anew,) = written(engine, Request(both, GENERATION))
    assert [step.token_ids for step in again] == [step.token_ids for step in anew]
    assert [step.tree and step.tree.token_ids for step in again] == [step.tree and step.tree.token_ids for step in anew]


def test_requests_with_different_drafters_share_steps(engine):
    asked = [Request(PROMPT, GENERATION), with_ngram(PROMPT), Request("Who are you?", GENERATION)]
    alone = [written(engine, one)[0][-1].summary.token_ids for one in asked]
    asked = [Request(PROMPT, GENERATION), with_ngram(PROMPT), Request("Who are you?", GENERATION)]
    assert [steps[-1].summary.token_ids for steps in written(engine, *asked)] == alone


def test_an_engine_without_a_drafter_takes_a_requests(engine):
    bare = Engine.from_pretrained(EMBEDDED_TARGET, drafter=None)
    (found,) = written(bare, with_ngram(PROMPT))
    (expected,) = written(engine, Request(PROMPT, GENERATION))
    assert found[-1].summary.token_ids == expected[-1].summary.token_ids
    assert any(step.kind == "tree" for step in found)


def test_a_guest_that_reads_features_is_refused(engine):
    with pytest.raises(ValueError, match="EAGLE-3 reads the target's features"):
        Request(PROMPT, GENERATION, drafter=engine.drafter.fork())
