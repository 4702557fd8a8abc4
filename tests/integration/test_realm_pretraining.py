"""Pre-training with the index in the loop: stops change no bit, swaps no program."""

import contextlib
import shutil

import chex
import jax
import numpy as np
import pytest
import toy_pretraining as toy
import toy_training
from etils import epath

from realm_retro.cli import refresh_index, towers
from realm_retro.cli import train as train_cli
from realm_retro.errors import UserError
from realm_retro.realm import search
from realm_retro.retrieval import refresh
from realm_retro.retrieval.refresh import training_ended

ADAPTIVE = {"target_overlap": 0.8, "every": 2, "shortest": 1, "longest": 3}
# What the index of each step is, with a refresh every 3 steps: a batch that is looked
# up a step ahead is looked up before the refresh.
ASKED = {0: [0, 0, 0, 3, 3, 3, 6, 6], 1: [0, 0, 0, 0, 3, 3, 3, 6]}
# A depth stands for the way to search: ahead, in time, or inside the step.
DEVICE = "device"
ASKED[DEVICE] = ASKED[0]


@pytest.fixture(scope="module", autouse=True)
def quick_compiles(tmp_path_factory):
    with toy_training.quick_compiles(tmp_path_factory):
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rivers")
    toy.write_rivers(folder)
    return folder


@pytest.fixture(scope="module")
def workdir(folder):
    """Passages and spans; each test trains a run of its own name."""
    return toy.prepared(toy.make_config(folder), epath.Path(folder / "work"))


class Crash(Exception):
    pass


def crash_at(step):
    def hook(at):
        if at.step == step:
            raise Crash

    return hook


def outcome(config, workdir):
    """Final weights and everything that was logged."""
    params = towers.run_params(config, workdir, config.name)
    return jax.device_get(params), toy.records(config, workdir)


@pytest.fixture(scope="module")
def straight(folder, workdir):
    """Runs that nothing disturbed, by depth and schedule; see `counting`."""
    made = {}

    def run(depth, adaptive=False):
        if (depth, adaptive) not in made:
            config = config_of(folder, f"straight{depth}{adaptive}", depth, adaptive)
            with counting() as (counts, hook):
                assert toy.train(config, workdir, hook).finished
            made[depth, adaptive] = *outcome(config, workdir), counts
        return made[depth, adaptive]

    return run


@contextlib.contextmanager
def counting():
    """Yields how many programs were compiled before each step's end, and the hook."""
    compiled, counts = [], []

    def count(event, duration, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(event)

    jax.clear_caches()  # or what other tests compiled would not be missed
    jax.monitoring.register_event_duration_secs_listener(count)
    try:
        yield counts, lambda at: counts.append(len(compiled))
    finally:
        jax.monitoring.unregister_event_duration_listener(count)


def config_of(folder, name, depth, adaptive=False, **changes):
    search = {"placement": "device"} if depth == DEVICE else {"depth": depth}
    return toy.make_config(
        folder,
        name=name,
        pretrain=search,
        refresh=ADAPTIVE if adaptive else {},
        **changes,
    )


EACH_DEPTH = pytest.mark.parametrize(
    "depth",
    [
        pytest.param(0, marks=pytest.mark.slow),
        1,
        pytest.param(DEVICE, marks=pytest.mark.slow),
    ],
)


@pytest.mark.parametrize(
    ("depth", "adaptive", "saved_every", "crashes"),
    [
        pytest.param(0, False, 4, (6,), marks=pytest.mark.slow),
        (1, False, 3, (5,)),  # saved just after a refresh, looked up before it
        pytest.param(DEVICE, False, 4, (6,), marks=pytest.mark.slow),
        pytest.param(DEVICE, False, 3, (2, 4), marks=pytest.mark.slow),
        pytest.param(1, False, 4, (2, 7), marks=pytest.mark.slow),
        pytest.param(1, True, 3, (4, 8), marks=pytest.mark.slow),
    ],
)
def test_crashes_change_nothing(
    folder, workdir, straight, depth, adaptive, saved_every, crashes
):
    expected = straight(depth, adaptive)
    name = f"crash{depth}{adaptive}{saved_every}"
    config = config_of(
        folder, name, depth, adaptive, train={"checkpoint_every": saved_every}
    )
    for step in crashes:
        with pytest.raises(Crash):
            toy.train(config, workdir, crash_at(step))
    lines = []
    assert toy.train(config, workdir, report=lines.append).finished
    saved = (crashes[-1] - 1) // saved_every * saved_every
    assert any(f"going on from step {saved}" in line for line in lines)
    found = outcome(config, workdir)
    chex.assert_trees_all_equal(found[0], expected[0])
    assert found[1] == expected[1]


@EACH_DEPTH
def test_the_log_says_which_index_each_step_asked(straight, depth):
    _, records, _ = straight(depth)
    assert [record["step"] for record in records] == list(range(1, 9))
    assert [record["index_step"] for record in records] == ASKED[depth]
    staleness = [step - asked for step, asked in enumerate(ASKED[depth])]
    assert [record["staleness"] for record in records] == staleness
    assert sum(record["own_hits"] for record in records) > 0
    assert all(record["retrieved"] == 3 for record in records)
    assert np.isfinite([record["loss"] for record in records]).all()


@pytest.mark.slow
def test_an_adaptive_schedule_refreshes_on_its_own(straight):
    _, records, _ = straight(1, True)
    asked = [record["index_step"] for record in records]
    assert asked == sorted(asked)
    assert len(set(asked)) > 2


@pytest.mark.slow
def test_the_index_matters_and_depth_matters(straight):
    zero, one = straight(0)[0], straight(1)[0]
    with pytest.raises(AssertionError):
        chex.assert_trees_all_equal(zero, one)


def test_all_towers_are_trained(folder, workdir, straight):
    after = straight(1)[0]
    before = towers.start_params(toy.make_config(folder), workdir)
    assert after.keys() == before.keys() == {"query", "document", "encoder"}
    for part in after:
        moved = jax.tree.map(
            lambda a, b: np.abs(a - b).max(), after[part], before[part]
        )
        assert max(jax.tree.leaves(moved)) > 1e-3, part


@EACH_DEPTH
def test_nothing_is_compiled_after_the_first_steps(straight, depth):
    counts = straight(depth)[2]
    assert counts[0] > 0
    assert counts[2:] == counts[1:-1], "an index was swapped after steps 3 and 6"


def test_one_candidate_is_the_plain_masked_model(folder, workdir):
    config = config_of(folder, "plain", 1, model={"candidates": 1}, train={"steps": 4})
    assert toy.train(config, workdir).finished
    for record in toy.records(config, workdir):
        assert record["retrieved"] == 0
        assert record["null_prior"] == 1
        assert record["mlm"] == record["null_mlm"]


@pytest.mark.slow
@pytest.mark.parametrize("masking", ["span", "tokens"])
def test_other_masks_need_no_spans(folder, workdir, tmp_path, masking):
    bare = epath.Path(tmp_path)
    (tmp_path / "passages").symlink_to(workdir / "passages")
    config = config_of(folder, "realm", 0, train={"steps": 2})
    config = toy.changed(config, pretrain={"masking": masking})
    assert toy.train(config, bare).finished
    assert toy.records(config, bare)[-1]["cut_spans"] == 0


def test_the_command_trains_to_the_end_and_says_so(folder, workdir, capsys):
    config = toy.make_config(folder, name="command")
    train_cli.main(config, workdir)
    said = capsys.readouterr().out
    assert "REALM with" in said
    assert "48 to retrieve, 4 candidates" in said
    assert "step 6: index of step 6 in use" in said
    assert "train: 8 steps in" in said
    root = workdir / "refresh" / "command"
    assert training_ended(root)
    assert refresh.newest_version(root).step == 6
    train_cli.main(config, workdir)
    assert "training is complete (8 steps)" in capsys.readouterr().out


@pytest.fixture(scope="module")
def interrupted(folder, workdir):
    """Config and workdir of a run stopped at step 4; its index is step 3's."""
    stopped = epath.Path(folder / "stopped")
    for name in ("passages", "spans"):
        shutil.copytree(workdir / name, stopped / name)
    config = toy.make_config(folder, name="interrupted")
    with pytest.raises(Crash):
        toy.train(config, stopped, crash_at(5))
    return config, stopped


@pytest.fixture
def spoilt(interrupted, tmp_path):
    """The same, to be spoilt."""
    config, stopped = interrupted
    shutil.copytree(stopped, tmp_path / "spoilt")
    return config, epath.Path(tmp_path / "spoilt")


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """A workdir over another corpus, with an index of step 3."""
    folder = tmp_path_factory.mktemp("other")
    toy.write_rivers(folder, documents=12, seed=1)
    config = toy.make_config(folder, name="interrupted")
    other = toy.prepared(config, epath.Path(folder / "work"))
    realm, store = towers.model_config(config), towers.open_store(config, other)
    arrays = search.tower_arrays(realm, towers.start_params(config, other))
    refresh.refresh_inline(
        refresh_index.folder(config, other),
        3,
        {name: np.asarray(x) for name, x in arrays.items()},
        towers.passage_embedder(config, other),
        refresh_index.target(config, store),
    )
    return other


def replace(workdir, other, *names):
    for name in names:
        shutil.rmtree(workdir / name)
        shutil.copytree(other / name, workdir / name)


def refused(config, workdir, *words):
    """Trains, which ends in one line that holds the words."""
    with pytest.raises(UserError) as error:
        train_cli.main(config, workdir)
    text = str(error.value)
    assert "\n" not in text
    for word in words:
        assert word in text, text


def test_an_index_that_is_gone(spoilt):
    config, workdir = spoilt
    shutil.rmtree(workdir / "refresh")
    version = "refresh/interrupted/versions/step-00000003"
    refused(config, workdir, version, "another --config.name")


def test_an_index_of_another_corpus(spoilt, other):
    config, workdir = spoilt
    replace(workdir, other, "refresh")
    version = "refresh/interrupted/versions/step-00000003"
    refused(config, workdir, version, "was made from passages")


@pytest.mark.slow
def test_each_run_has_its_own_indexes(spoilt):
    config, workdir = spoilt
    another = toy.changed(config, name="another", train={"steps": 4})
    assert toy.train(another, workdir).finished
    assert toy.train(config, workdir).finished
    asked = [record["index_step"] for record in toy.records(config, workdir)]
    assert asked == ASKED[1]


def test_an_index_of_another_model(spoilt):
    # The weights would fit, but their vectors are others.
    config, workdir = spoilt
    other = toy.changed(config, model={"pooling": "mean"})
    root = refresh_index.folder(config, workdir)
    shutil.rmtree(root / "versions")
    with pytest.raises(UserError, match="is of a training over model") as error:
        refresh_index.main(other, workdir)
    assert "\n" not in str(error.value)


def test_spans_of_another_corpus(spoilt, other):
    config, workdir = spoilt
    replace(workdir, other, "spans")
    refused(config, workdir, "spans", "was made from passages", "cli.tag_spans")


def test_another_corpus_under_the_same_run(spoilt, other):
    config, workdir = spoilt
    replace(workdir, other, "passages", "spans")
    refused(config, workdir, "runs/interrupted", "data: ", "--config.name")


def test_fewer_passages_than_candidates(folder, tmp_path):
    toy.write_rivers(tmp_path, documents=1)
    config = toy.make_config(tmp_path)
    small = toy.prepared(config, epath.Path(tmp_path / "work"))
    refused(config, small, "holds 2 passages", "config.model.candidates=4", "lower it")


@pytest.mark.parametrize(
    ("section", "value", "words"),
    [
        ("model", {"body_length": 23}, ("passages.length=24", "model.body_length=23")),
        ("model", {"title_length": 3}, ("title_length=4", "model.title_length=3")),
        ("model", {"max_positions": 40}, ("inputs of 43 tokens", "max_positions=40")),
        ("model", {"candidates": 0}, ("candidates=0 must be at least 1",)),
        ("pretrain", {"depth": 2}, ("config.pretrain.depth=2", "choose 0, 1")),
        ("pretrain", {"masking": "all"}, ("config.pretrain.masking='all'", "salient")),
        ("pretrain", {"refresh": "often"}, ("config.pretrain.refresh='often'",)),
        ("pretrain", {"extra": -1}, ("config.pretrain.extra=-1",)),
        ("refresh", {"every": 0}, ("config.refresh: every=0",)),
        (
            "pretrain",
            {"placement": "device"},
            ("config.refresh.target_overlap=0.8", "placement=device"),
        ),
        ("task", "realm_pretraining", ("config.task='realm_pretraining'", "realm_ict")),
    ],
)
def test_settings_that_do_not_fit_are_one_clear_line(
    folder, workdir, section, value, words
):
    adaptive = ADAPTIVE if "placement" in value else {}
    config = toy.make_config(
        folder, **{"name": "wrong", "refresh": adaptive, section: value}
    )
    refused(config, workdir, *words)


def test_stages_that_did_not_run(folder, workdir, tmp_path):
    config = toy.make_config(folder)
    refused(config, epath.Path(tmp_path), "passages missing", "realm_retro.cli.prepare")
    (tmp_path / "passages").symlink_to(workdir / "passages")
    refused(config, epath.Path(tmp_path), "spans missing", "realm_retro.cli.tag_spans")
