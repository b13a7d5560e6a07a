"""The one spelling of expert policies: what it reads, what it writes, and every refusal with its sentence."""

from __future__ import annotations

import pytest
import torch

from moespec import EMBEDDED_TARGET, BudgetConfig, Engine
from moespec.bench.arms import parse_arm
from moespec.cli import main
from moespec.policies.method import RoutedModel
from moespec.policies.parsing import parse_policy
from moespec.policies.profiles import EMBEDDED_PROFILES, Profile, profiles_folder, read_profile, write_profile
from moespec.quality.cli import quality_arms

NAMES = [
    "sere:s=2,rho=0,measure=frobenius",
    "sere:s=3,rho=0.25,measure=cka",
    "oea:k0=4",
    "top-s:s=4",
    "random:b=12,seed=0",
    "oracle",
    "oracle:b=12",
    "accept-moe-like:scale=1,commitment=profile",
    "accept-moe-like:scale=0.5,commitment=path",
    "alloc-moe-like:b=12,policy=substitution,score=softmax,row-weight=uniform",
    "alloc-moe-like:b=12,policy=truncation,score=natural,row-weight=path,root",
]


@pytest.mark.parametrize("name", NAMES)
def test_a_policys_name_is_read_back(name):
    policy = parse_policy(name, EMBEDDED_PROFILES)
    assert policy.policy_name == name
    assert parse_policy(policy.policy_name, EMBEDDED_PROFILES) == policy
    assert not policy.is_lossless
    assert parse_arm(f"{name}@8,4,3", EMBEDDED_PROFILES).budget == policy


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("sere:s=2", "sere:s=2,rho=0,measure=frobenius"),
        ("sere:measure=cosine,s=2", "sere:s=2,rho=0,measure=cosine"),
        ("random:b=9", "random:b=9,seed=0"),
        ("accept-moe-like", "accept-moe-like:scale=1,commitment=profile"),
    ],
)
def test_what_is_left_out_stands_in_the_name(text, name):
    assert parse_policy(text, EMBEDDED_PROFILES).policy_name == name


@pytest.mark.parametrize(
    ("text", "config"),
    [
        ("none", BudgetConfig()),
        ("moe-spec:b=12", BudgetConfig(12)),
        (
            "moe-spec:b=12,score=natural,row-weight=path,policy=truncation,root",
            BudgetConfig(12, policy="truncation", score="natural", row_weight="path", protect_root=True),
        ),
        ("moe-spec:coverage=0.9", BudgetConfig(coverage=0.9)),
        ("moe-spec:b=9,row-weight=depth,depth-decay=0.5", BudgetConfig(9, row_weight="depth", depth_decay=0.5)),
    ],
)
def test_moe_spec_is_the_config_that_runs_compiled(text, config):
    assert parse_policy(text) == config


def test_old_arms_and_new_ones_are_the_same_setting():
    old, new = parse_arm("moe-spec:truncation:12:natural+path+root"), parse_arm("moe-spec:b=12,policy=truncation,root")
    assert old.budget == BudgetConfig(12, policy="truncation", score="natural", row_weight="path", protect_root=True)
    assert new.budget == BudgetConfig(12, policy="truncation", protect_root=True)
    assert [arm.name for arm in quality_arms("oea:k0=2 moe-spec:b=9@8,4,3")] == [
        "eagle3",
        "eagle3",
        "oea:k0=2",
        "moe-spec:b=9",
    ]


REFUSALS = [
    ("serre:s=2", "write NAME or NAME:key=value,... with none, moe-spec, alloc-moe-like, accept-moe-like, oea, sere"),
    ("", "cannot be read"),
    ("none:b=2", "cannot be read"),
    ("oea:", "cannot be read"),
    ("oea", "oea needs k0: write oea:k0=..."),
    ("oea:k=2", "oea has no 'k': its keys are k0."),
    ("oea:k0=2,k0=3", "k0 is given twice"),
    ("oea:k0=two", "k0=two is not understood: k0 is a whole number"),
    ("oea:k0", "k0 is not understood: k0 is a whole number"),
    ("oea:k0=0", "oea: k0=0 is not allowed: use 1 or more"),
    ("top-s:s=-1", "use 1 or more"),
    ("random:b=0", "use 1 or more"),
    ("random:b=9,seed=-1", "use 0 or more"),
    ("oracle:b=0", "use 1 or more"),
    ("oracle:path=3", "oracle has no 'path': its keys are b."),
    ("sere:s=2,profile=x", "its keys are s, rho, measure."),
    ("sere:s=0", "use 1 or more"),
    ("sere:s=2,rho=-0.1", "use 0 or more"),
    ("sere:s=2,rho=nan", "use 0 or more"),
    ("sere:s=2,measure=angle", "use frobenius or cosine or cka"),
    ("sere:s=2,measure=", "measure= is not understood: measure is a word"),
    ("accept-moe-like:scale=0", "use a number above 0"),
    ("accept-moe-like:commitment=hope", "use profile or path"),
    ("alloc-moe-like", "alloc-moe-like needs b"),
    ("alloc-moe-like:b=12,row-weight=age", "uniform, depth, path"),
    ("alloc-moe-like:b=12,root=yes", "root is a word of its own, without a value"),
    ("moe-spec", "moe-spec needs b or coverage"),
    ("moe-spec:b=0", "budget=0 is not allowed"),
    ("moe-spec:b=9,coverage=0.5", "exclude each other"),
    ("moe-spec:b=9,policy=drop", "substitution or truncation"),
]


@pytest.mark.parametrize(("text", "sentence"), REFUSALS)
def test_what_cannot_be_read_is_refused_in_a_sentence(text, sentence):
    with pytest.raises(ValueError) as refusal:
        parse_policy(text, EMBEDDED_PROFILES)
    assert sentence in str(refusal.value) and "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("text", "kind"), [("sere:s=2", "similarity"), ("alloc-moe-like:b=9", "sensitivity"),
                       ("accept-moe-like:commitment=profile", "acceptance")]
)  # fmt: skip
def test_a_missing_file_is_named_with_the_command_that_makes_it(text, kind, tmp_path):
    for folder in (tmp_path, None):
        with pytest.raises(ValueError, match=f"python -m moespec inspect {kind} --out") as refusal:
            parse_policy(text, folder)
        assert "--profiles" in str(refusal.value)


def test_accept_moe_like_does_without_a_file(tmp_path):
    assert parse_policy("accept-moe-like", tmp_path).policy_name == "accept-moe-like:scale=1,commitment=path"


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("sere:s=9", "sere: s=9 is not allowed: use 1 to 8"),
        ("oea:k0=9", "use 1 to 8"),
        ("top-s:s=9", "use 1 to 8"),
        ("random:b=7", "use 8 to 64"),
        ("oracle:b=65", "use 8 to 64"),
        ("alloc-moe-like:b=7", "use 8 to 64"),
        ("moe-spec:b=7", "outside 8 to 64"),
    ],
)
def test_parameters_outside_the_model_are_refused_with_the_range(text, sentence, capsys):
    assert main(["generate", "Hello", "--policy", text, "--drafter", "ngram", "--max-new-tokens", "1"]) == 2
    assert sentence in capsys.readouterr().err


def test_a_file_of_another_model_is_refused(tmp_path):
    engine = Engine.from_pretrained(EMBEDDED_TARGET, drafter="ngram")
    assert engine.routed_model == RoutedModel(tuple(range(8)), 64, 8)
    other = RoutedModel((0, 1), 12, 3)
    measures = {name: torch.rand(2, 12, 12) for name in ("frobenius", "cosine", "cka")}
    write_profile(tmp_path / "similarity.safetensors", Profile("similarity", other, measures), {"model_name": "other"})
    budget = parse_policy("sere:s=1", tmp_path)
    torch.testing.assert_close(budget.policy.profile.tensors, measures)
    with pytest.raises(ValueError, match="2 MoE layers of 12 experts, top-3, not 8 MoE layers of 64 experts, top-8"):
        engine.check_budget(budget)
    engine.check_budget(parse_policy("sere:s=8", EMBEDDED_PROFILES))


def test_a_file_that_is_none_is_refused(tmp_path):
    path = tmp_path / "similarity.safetensors"
    path.write_bytes(b"not safetensors")
    with pytest.raises(ValueError, match="is no similarity file of schema 1"):
        read_profile(tmp_path, "similarity", "sere")
    path.write_bytes((EMBEDDED_PROFILES / "acceptance.safetensors").read_bytes())
    with pytest.raises(ValueError, match="it is acceptance"):
        read_profile(tmp_path, "similarity", "sere")


def test_files_are_looked_for_beside_the_target(tmp_path):
    assert profiles_folder(None, None) == EMBEDDED_PROFILES == profiles_folder(str(EMBEDDED_TARGET), None)
    assert profiles_folder(str(tmp_path), None) == tmp_path / "profiles"
    assert profiles_folder("owner/name", None) is None
    assert profiles_folder("owner/name", tmp_path) == tmp_path


def test_the_embedded_models_files_are_small_and_there():
    files = sorted(path.name for path in EMBEDDED_PROFILES.iterdir())
    assert files == ["acceptance.safetensors", "sensitivity.safetensors", "similarity.safetensors"]
    assert sum(path.stat().st_size for path in EMBEDDED_PROFILES.iterdir()) < 2**20


def test_generate_takes_a_policy_and_no_second_one(capsys):
    arguments = ["generate", "Hello", "--max-new-tokens", "12", "--json"]
    assert main([*arguments, "--policy", "oea:k0=2"]) == 0
    assert '"policy": "oea:k0=2"' in capsys.readouterr().out
    assert main([*arguments, "--policy", "oea:k0=2", "--budget", "12"]) == 2
    assert "says it all" in capsys.readouterr().err
    assert main([*arguments, "--policy", "truncation", "--budget", "12"]) == 0
    assert '"policy": "truncation"' in capsys.readouterr().out
