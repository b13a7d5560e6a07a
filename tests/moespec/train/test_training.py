"""What decides a run: the balance loss, the masks of what the assistant says, the budget, the split."""

from __future__ import annotations

import pytest
import torch

from moespec import EMBEDDED_TARGET
from moespec.hf import AutoTokenizer
from moespec.train.balance import balance_loss
from moespec.train.data import MixedStream, Renderer
from moespec.train.feed import Feed
from moespec.train.filters import rejection_reason
from moespec.train.identity import identity_documents
from moespec.train.prepare import is_held_out
from moespec.train.schedule import Progress, learning_rate


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(EMBEDDED_TARGET)


def chats() -> list[dict]:
    import random

    return list(identity_documents(random.Random(0), count=50))


def test_balance_loss_equals_its_definition():
    logits = [torch.randn(40, 6, generator=torch.Generator().manual_seed(n)) for n in range(2)]
    expected = 0.0
    for logits_NE in logits:
        probs = logits_NE.double().softmax(-1)
        for expert in range(6):
            chosen = sum(expert in row.topk(2).indices.tolist() for row in probs)
            expected += 6 * chosen / (40 * 2) * float(probs[:, expert].mean()) / 2
    assert float(balance_loss(logits, top_k=2)) == pytest.approx(expected, abs=1e-5)


def test_the_mask_covers_what_the_assistant_says_and_its_end(tokenizer):
    document = {"messages": [{"role": "user", "content": "Hi there"}, {"role": "assistant", "content": "Hello 12!"}]}
    ids, mask = Renderer(tokenizer)(document)
    said = tokenizer.decode([token for token, is_said in zip(ids, mask, strict=True) if is_said])
    assert said == "Hello 12!<|im_end|>"
    template = tokenizer.apply_chat_template(document["messages"], tokenize=False)
    assert tokenizer.decode(ids) == template + "<|endoftext|>"


def test_a_restored_stream_goes_on_where_it_was(tokenizer):
    streams = [MixedStream(chats(), Renderer(tokenizer), seed=3) for _ in range(2)]
    streams[0].batch(2, 64)
    streams[1].restore(streams[0].state())
    for ours, theirs in zip(*(stream.batch(2, 64) for stream in streams), strict=True):
        assert torch.equal(ours, theirs)


def test_sequences_join_without_gap_or_overlap(tokenizer):
    stream = MixedStream(chats(), Renderer(tokenizer), seed=3)
    ids_BS = stream.batch(3, 32).ids_BS
    assert torch.equal(ids_BS[:-1, -1], ids_BS[1:, 0])
    assert stream.batch(1, 32)[0][0, 0] == ids_BS[-1, -1]


def test_one_long_sequence_is_cut_into_many(tokenizer):
    long, short = (MixedStream(chats(), Renderer(tokenizer), seed=3) for _ in range(2))
    for ours, theirs in zip(long.batch(1, 96).in_sequences(32), short.batch(3, 32), strict=True):
        assert torch.equal(ours, theirs)


def test_a_feed_of_no_workers_is_the_stream(tokenizer):
    feed, stream = Feed(chats(), Renderer(tokenizer), 3, 64), MixedStream(chats(), Renderer(tokenizer), 3)
    for _ in range(3):
        assert torch.equal(feed.take().ids_BS, stream.batch(1, 64).ids_BS)
    assert feed.tokens == stream.tokens


def test_workers_take_turns_with_a_share_each_and_go_on_where_they_were(tokenizer):
    documents = [
        {"source": "numbers", "group": "dialogue", "messages": [{"role": "user", "content": f"{n}"}]}
        for n in range(1000, 1200)
    ]

    def feed() -> Feed:
        return Feed(documents, Renderer(tokenizer), 3, 64, {"dialogue": 1.0}, num_workers=2)

    straight, first = feed(), feed()
    batches = [straight.take().ids_BS for _ in range(7)]
    # One pass over the documents of each: nothing comes twice before everything came once.
    words = [set(tokenizer.decode(torch.cat(batches[worker::2], dim=1)[0]).split("\n")) for worker in range(2)]
    assert not {word for word in words[0] & words[1] if word[:4].isdigit() and len(word) > 4}
    assert all(torch.equal(first.take().ids_BS, batch) for batch in batches[:3])  # what was made ahead is lost
    second = feed()
    second.restore(first.state())
    assert all(torch.equal(second.take().ids_BS, batch) for batch in batches[3:])
    assert second.tokens == straight.tokens
    with pytest.raises(ValueError, match="as many workers"):
        Feed(documents, Renderer(tokenizer), 3, 64).restore(first.state())


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("write to a.b@example.com", "personal data"),
        ("call (555) 123-4567 now", "personal data"),
        ("hello [user 2's name]", "placeholder"),
        ("what the fuck", "profanity"),
        ("the Dickens novel has 200 pages", None),
    ],
)
def test_filters(text, reason):
    assert rejection_reason(text) == reason


def test_the_split_is_by_text_alone_and_near_one_in_fifty():
    documents = [{"text": f"document {n}"} for n in range(20_000)]
    share = sum(map(is_held_out, documents)) / len(documents)
    assert 0.015 < share < 0.025
    assert is_held_out({"text": "x", "source": "a"}) == is_held_out({"text": "x", "source": "b"})


def test_the_rate_warms_up_and_ends_low():
    assert learning_rate(1.0, 0.0, 0, 100) == pytest.approx(0.01)
    assert learning_rate(1.0, 0.5, 500, 100) == 1.0
    assert learning_rate(1.0, 1.0, 500, 100) == pytest.approx(0.01)


def test_earlier_tokens_count_towards_the_end_but_not_towards_the_time_left():
    progress = Progress(None, max_tokens=1000, first_tokens=400)
    progress.tokens, progress.seconds = 600, 50.0
    assert progress.fraction == 0.6
    assert progress.seconds_left == pytest.approx(100.0)  # 200 tokens took 50 s, 400 are left


def test_a_run_needs_one_budget():
    with pytest.raises(ValueError, match="either minutes or tokens"):
        Progress(None, None)
