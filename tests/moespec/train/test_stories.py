"""The project's own stories are whole and about what was asked; a storybook's pages are undone, its words are not."""

from __future__ import annotations

import random
import re

import pytest

from moespec.train.filters import rejection_reason
from moespec.train.prepare import document_text, unwrapped
from moespec.train.stories import story, story_documents


@pytest.mark.parametrize("seed", range(50))
def test_a_story_is_whole_and_about_its_subjects(seed):
    told = story(random.Random(seed))
    assert not re.search(r"[{}]|  | a [aeiou]", told.text)
    assert len(re.findall(r"[.!?]", told.text)) >= 5 and told.text.endswith((".", "!"))
    assert told.hero in told.text and told.friend in told.text
    words = set(re.findall(r"\w+", told.text))
    for subject in told.subjects:
        assert set(subject.split()) - {"a", "an", "and"} <= words, subject


def test_a_pronoun_agrees_with_its_hero():
    for seed in range(200):
        told = story(random.Random(seed))
        own, other = ({"she", "her"}, {"he", "him", "his"})
        if told.hero_kind in ("boy", "king"):
            own, other = other, own
        if told.hero_kind in ("girl", "boy", "king", "queen"):
            words = set(re.findall(r"\w+", told.text.lower()))
            assert words & own
            assert words & other <= ({"she", "her"} if "mother" in words else set()), told.text


def test_chats_of_stories_are_fit_for_training_and_drawn_by_seed():
    documents = list(story_documents(random.Random(0), 300))
    assert documents == list(story_documents(random.Random(0), 300))
    assert {document["source"] for document in documents} == {"stories"}
    assert len({document_text(document) for document in documents}) == 300
    for document in documents:
        roles = [message["role"] for message in document["messages"]]
        assert roles == ["user", "assistant"] * (len(roles) // 2)
        assert rejection_reason(document_text(document)) is None


def test_the_lines_of_a_storybook_are_joined_inside_sentences_alone():
    told = 'Long ago people\nknew little,\nvery little.\nNow they went to\nNairobi.\n"Ho!"\nthey said.'
    book = {"source": "storybooks_asp", "group": "prose", "messages": [{"role": "assistant", "content": told}]}
    joined = unwrapped(book)["messages"][0]["content"]
    assert joined == 'Long ago people knew little, very little.\nNow they went to Nairobi.\n"Ho!"\nthey said.'
    assert joined.split() == told.split()
    other = book | {"source": "recipes_based_cooking"}
    assert unwrapped(other) == other
