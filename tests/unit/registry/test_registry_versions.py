"""The decisions about commands on a model's versions and aliases."""

from __future__ import annotations

import pytest
from unit.registry.registry_examples import GOLDEN, T0, at, file, pushed, told, with_versions

from slmops.contracts.commands import RegisterVersion, RetireVersion, SetAlias
from slmops.contracts.errors import AlreadyExists, IllegalTransition, InternalError, InvalidMessage, NotFound
from slmops.contracts.events import ModelAliasMoved, ModelVersionRegistered, PackagePublished
from slmops.contracts.model import files_digest
from slmops.contracts.prompts.evaluation_data import EvaluationData
from slmops.registry.domain.lifecycle import State
from slmops.registry.domain.versions import Model, check_files, evolve, holds, register, replay, retire, set_alias

EMPTY = Model("smollm2")


def alias(name: str, version: str) -> SetAlias:
    return SetAlias(model="smollm2", alias=name, version=version)


def retirement(version: str) -> RetireVersion:
    return RetireVersion(model="smollm2", version=version, reason="old")


def registered(model: Model, version: str) -> ModelVersionRegistered:
    return model.versions[version].event


def test_a_version_is_identified_by_its_files() -> None:
    model = with_versions(pushed("1.0.0"))
    assert registered(model, "1.0.0").digest == files_digest([file("model.gguf", "weights")])
    assert registered(model, "1.0.0").at == T0


def test_the_order_of_files_does_not_matter() -> None:
    first, second = file("a.json", "a"), file("model.gguf", "weights")
    forward = pushed("1.0.0").model_copy(update={"files": (first, second)})
    backward = pushed("1.0.0").model_copy(update={"files": (second, first)})
    assert register(EMPTY, forward, T0) == register(EMPTY, backward, T0)


def test_the_same_files_again_are_the_same_version() -> None:
    assert register(with_versions(pushed("1.0.0")), pushed("1.0.0"), at(9)) == []


def test_other_files_under_a_version_are_refused_also_after_its_retirement() -> None:
    model = with_versions(pushed("1.0.0"))
    for state in (model, told(model, *retire(model, retirement("1.0.0"), T0))):
        with pytest.raises(AlreadyExists, match="choose a new version") as refusal:
            register(state, pushed("1.0.0", "other weights"), T0)
        assert refusal.value.where and "smollm2:1.0.0" in refusal.value.where


def test_the_same_files_may_be_another_version() -> None:
    model = with_versions(pushed("1.0.0"), pushed("1.0.1"))
    assert registered(model, "1.0.0").digest == registered(model, "1.0.1").digest


def test_golden_prompts_are_kept_from_the_newest_version_that_is_not_retired() -> None:
    newer = file("golden.jsonl", "better questions")
    model = with_versions(pushed("1.0.0", golden=GOLDEN), pushed("1.1.0", "b", newer), pushed("1.2.0", "c"))
    golden = registered(model, "1.2.0").golden
    assert golden is not None and golden.digest == newer.digest
    for version in ("1.2.0", "1.1.0"):
        model = told(model, *retire(model, retirement(version), T0))
    [event] = register(model, pushed("1.3.0", "d"), T0)
    assert isinstance(event, ModelVersionRegistered)
    assert event.golden is not None and event.golden.digest == GOLDEN.digest


def test_a_first_version_may_have_no_golden_prompts() -> None:
    assert registered(with_versions(pushed("1.0.0")), "1.0.0").golden is None


def test_golden_prompts_among_the_files_are_not_part_of_the_version() -> None:
    listed = with_versions(pushed("1.0.0", "weights", GOLDEN, GOLDEN))
    apart = with_versions(pushed("1.0.0", golden=GOLDEN))
    assert registered(listed, "1.0.0") == registered(apart, "1.0.0")
    assert register(listed, pushed("1.0.0"), T0) == []
    assert holds(listed, "1.0.0", (file("model.gguf", "weights"), GOLDEN))
    assert holds(listed, "1.0.0", (file("model.gguf", "weights"),))


def test_other_golden_prompts_for_a_version_are_refused() -> None:
    for model in (with_versions(pushed("1.0.0", golden=GOLDEN)), with_versions(pushed("1.0.0"))):
        with pytest.raises(AlreadyExists, match="golden"):
            register(model, pushed("1.0.0", golden=file("golden.jsonl", "other")), T0)


TEXT, TASK = file("texts/mails.txt", "mails"), file("tasks/products.jsonl", "questions about products")
DATA = EvaluationData(texts=(TEXT,), tasks=(TASK,))


def with_data(version: str, data: EvaluationData | None = DATA) -> RegisterVersion:
    return pushed(version, golden=GOLDEN).model_copy(update={"data": data})


def test_own_texts_and_tasks_are_part_of_a_version_and_not_of_its_identity() -> None:
    model = with_versions(with_data("1.0.0"))
    assert registered(model, "1.0.0").data == DATA
    assert registered(model, "1.0.0").digest == registered(with_versions(pushed("1.0.0")), "1.0.0").digest
    everything = with_data("1.0.0").model_copy(update={"files": (*pushed("1.0.0").files, GOLDEN, TEXT, TASK)})
    assert registered(with_versions(everything), "1.0.0").files == registered(model, "1.0.0").files
    assert holds(model, "1.0.0", everything.files), "an upload lists all files together"


def test_a_version_takes_no_texts_and_tasks_from_another_one() -> None:
    model = with_versions(with_data("1.0.0"), pushed("1.1.0", "b"))
    assert registered(model, "1.1.0").data is None


def test_texts_and_tasks_of_a_version_never_change() -> None:
    model = with_versions(with_data("1.0.0"))
    assert register(model, with_data("1.0.0"), T0) == register(model, with_data("1.0.0", None), T0) == []
    for there in (model, with_versions(pushed("1.0.0", golden=GOLDEN))):
        with pytest.raises(AlreadyExists, match="other texts and tasks") as refusal:
            register(there, with_data("1.0.0", EvaluationData(texts=(file("texts/mails.txt", "other"),))), T0)
        assert "--texts" in str(refusal.value.fix)


def test_golden_prompts_alone_are_not_a_model() -> None:
    with pytest.raises(InvalidMessage, match="are not a model"):
        register(EMPTY, pushed("1.0.0", golden=GOLDEN).model_copy(update={"files": (GOLDEN,)}), T0)


@pytest.mark.parametrize("paths", [("a", "a"), ("a", "a/b"), ("a/b/c", "a"), ("a/b", "a//b"), ("A", "a"), ("A/b", "a")])
def test_files_that_cannot_be_in_one_folder_are_rejected(paths: tuple[str, str]) -> None:
    with pytest.raises(InvalidMessage):
        check_files([file(path, path) for path in paths])


def test_a_moved_alias_records_its_previous_version() -> None:
    model = with_versions(pushed("1.0.0"), pushed("1.0.1"))
    model = told(model, *set_alias(model, alias("stable", "1.0.0"), T0))
    [moved] = set_alias(model, alias("stable", "1.0.1"), at(5))
    assert moved == ModelAliasMoved(model="smollm2", alias="stable", version="1.0.1", previous="1.0.0", at=at(5))
    assert told(model, moved).aliases == {"stable": "1.0.1"}


def test_setting_an_alias_to_its_current_version_does_nothing() -> None:
    model = with_versions(pushed("1.0.0"))
    model = told(model, *set_alias(model, alias("stable", "1.0.0"), T0))
    assert set_alias(model, alias("stable", "1.0.0"), at(1)) == []


def test_an_unknown_version_is_reported_with_the_registered_ones() -> None:
    model = with_versions(pushed("1.0.0"))
    with pytest.raises(NotFound, match=r"1\.0\.0"):
        set_alias(model, alias("stable", "2.0.0"), T0)
    with pytest.raises(NotFound, match="none"):
        retire(EMPTY, retirement("1.0.0"), T0)


def test_a_retired_version_takes_no_alias() -> None:
    model = with_versions(pushed("1.0.0"))
    model = told(model, *retire(model, retirement("1.0.0"), T0))
    assert model.state_of("1.0.0") is State.RETIRED
    with pytest.raises(IllegalTransition, match="retired"):
        set_alias(model, alias("stable", "1.0.0"), T0)


def test_a_version_with_an_alias_is_not_retired_until_the_alias_moves() -> None:
    model = with_versions(pushed("1.0.0"), pushed("1.0.1"))
    model = told(model, *set_alias(model, alias("stable", "1.0.0"), T0))
    with pytest.raises(IllegalTransition, match="stable"):
        retire(model, retirement("1.0.0"), T0)
    model = told(model, *set_alias(model, alias("stable", "1.0.1"), T0))
    model = told(model, *retire(model, retirement("1.0.0"), T0))
    assert retire(model, retirement("1.0.0"), at(1)) == []


def test_a_replay_gives_the_same_model() -> None:
    model, events = EMPTY, []
    for command in (pushed("1.0.0", golden=GOLDEN), pushed("1.0.1", "b")):
        events += register(model, command, T0)
        model = replay("smollm2", events)
    events += set_alias(model, alias("stable", "1.0.1"), T0)
    model = replay("smollm2", events)
    events += retire(model, retirement("1.0.0"), T0)
    model = replay("smollm2", events)
    assert [(name, v.state) for name, v in model.versions.items()] == [
        ("1.0.0", State.RETIRED),
        ("1.0.1", State.REGISTERED),
    ]


def test_an_impossible_history_is_rejected() -> None:
    model = with_versions(pushed("1.0.0"))
    with pytest.raises(IllegalTransition):
        evolve(model, registered(model, "1.0.0"))
    with pytest.raises(IllegalTransition):
        evolve(model, ModelAliasMoved(model="smollm2", alias="stable", version="9.9.9", at=T0))


def test_an_event_of_another_service_is_a_defect() -> None:
    with pytest.raises(InternalError):
        evolve(EMPTY, PackagePublished.model_construct(model="smollm2"))
