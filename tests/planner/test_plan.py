"""A plan end to end: on simulated devices, and ahead of time for slices that are not there."""

import dataclasses
import json
import re

import jax
import jax.numpy as jnp
import pytest
from markupsafe import escape

from tests.miniature import ROOT
from tests.planner import narrow
from xomni_jax.cli.main import main
from xomni_jax.core.config import ConfigError
from xomni_jax.core.flops import count
from xomni_jax.models import work
from xomni_jax.models.transformer import PRESETS
from xomni_jax.planner import chips, gates, plan, report, roofline
from xomni_jax.planner.check import checks
from xomni_jax.planner.chips import GIB
from xomni_jax.planner.compiled import compile_program, needed
from xomni_jax.sharding import abstract
from xomni_jax.sharding.mesh import make_mesh

CPU = chips.parse("cpu:4")
UNCUT = {"policy-update": ["rollout.logit_chunk=0"], "sft-update": ["next_token.chunk=0"]}


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("plans")


def made(config, topology, programs, cache):
    return plan.make_plan(config, chips.parse(topology), programs, cache, propose=False, quiet=True)


def verdicts(analysis, topology):
    return {c.name: (c.ok, c.found) for c in checks(analysis, chips.parse(topology))}


def test_text_encoders_on_simulated_devices(cache):
    """Operations by arithmetic: every kernel once per token."""
    (f,) = made(narrow.grpo("mesh.tensor=1"), "cpu:4", ["text"], cache).analyses
    assert f.flops["weights"] == pytest.approx(f.forward, rel=1e-3)
    assert f.memory["arguments"] > 0 and not f.unknown


def test_every_program_is_the_trainers_own(cache):
    stage = plan.programs_on(narrow.grpo(), CPU)
    assert list(stage.programs) == ["policy-update", "reference", "layout", "rollout", "prefill", "decoder", "text", "vae"]
    assert {name: p.per_step for name, p in stage.programs.items() if p.per_step} == {
        "policy-update": 1, "layout": 1, "rollout": 1, "prefill": 1, "decoder": 1
    }  # fmt: skip
    # 64 codes in segments of at most 24.
    halves = plan.programs_on(narrow.grpo("rollout.segment=24", "rollout.chunks=2"), CPU)
    assert (halves.programs["rollout"].per_step, halves.programs["rollout"].work.steps, halves.programs["prefill"].per_step) == (8, 16, 2)
    whole, part = stage.programs["rollout"].work, halves.programs["rollout"].work
    assert (part.forward * 8, part.tokens * 8) == (whole.forward, whole.tokens)
    buckets = plan.programs_on(narrow.grpo("data.sizes=((16,32),(32,32))", "data.weights=(1,1)", "data.text_lengths=((2,3),(2,3))"), CPU)
    more = {name.partition("@")[0]: program for name, program in buckets.programs.items() if name.endswith("@32x32")}
    assert list(more) == [name for name in stage.programs if name != "layout"] and len(buckets.programs) == 2 * len(more) + 1
    assert all(program.per_step == 0 for program in more.values()) and "images of 32x32" in more["decoder"].about
    places = [stage.programs[name].fn.__module__ for name in ("policy-update", "rollout")]
    assert places == ["xomni_jax.rl.update", "xomni_jax.sampling.sampler"]
    # Without a penalty there is no reference, neither as a program nor in memory.
    free = plan.programs_on(narrow.grpo("grpo.kl_coef=0.0"), CPU)
    assert "reference" not in free.programs and "reference" not in free.persistent


@pytest.mark.parametrize("config, program", [(narrow.grpo, "policy-update"), (narrow.sft, "sft-update")])
def test_updates_cost_what_arithmetic_says(config, program):
    """Nothing recomputed: 6ND of the update and 2ND of the reference, exactly."""
    stage = plan.programs_on(config("transformer.remat=none", *UNCUT[program]), CPU)
    found, w = count(stage.programs[program].fn.trace(*stage.programs[program].args).jaxpr), stage.programs[program].work
    assert found.weights == pytest.approx(w.learned + w.forward, rel=1e-3)


def test_a_head_is_gathered_once_for_all_micro_batches(cache):
    """Four of them, on simulated devices: the policy's and the reference's."""
    (f,) = made(narrow.grpo("accumulate=4"), "cpu:4", ["policy-update"], cache).analyses
    assert verdicts(f, "cpu:4")["head gathers"] == (True, "2") and 4 in f.loops


def test_what_is_compiled_is_kept(cache, tmp_path):
    fn, mesh = jax.jit(lambda x: x @ x), make_mesh({"fsdp": 4}, jax.devices()[:4])
    args = (jax.ShapeDtypeStruct((8, 8), jnp.float32),)
    first, again = (compile_program(fn, args, mesh, CPU, tmp_path) for _ in range(2))
    assert (first.hlo, first.memory, first.key, first.seconds) == (again.hlo, again.memory, again.key, again.seconds)
    other = compile_program(jax.jit(lambda x: x @ x + 1), args, mesh, CPU, tmp_path)
    assert other.key != first.key


def test_what_the_compiler_says_it_would_need():
    said = "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (31.22G) "
    said += "exceeds available HBM (15.75G)."
    assert needed(said) == int(31.22 * GIB)


def test_an_update_for_a_slice_that_is_not_there(cache, tmp_path):
    """Narrow, on v5e:2x2: the checks of the full size hold, and the plan reads as text, page and JSON."""
    made_plan = made(narrow.sft(), "v5e:2x2", ["sft-update"], cache)
    (f,) = made_plan.analyses
    found = verdicts(f, "v5e:2x2")
    held = {"memory", "loops understood", "operations / 6ND, attention apart", "positions with logits at once", "state updated in place",
            "float32 weight gathers", "all-to-all in the layer loop"}  # fmt: skip
    assert {name for name in held if not found[name][0]} == set()
    text = report.text(made_plan, price=1.0)
    assert "sft on v5e:2x2 (v5litepod-4, 4 chips), mesh fsdp 2 x tensor 2" in text and "bound by" in text and "a step" in text
    assert json.loads(json.dumps(report.as_json(made_plan)))["programs"][0]["program"] == "sft-update"
    page = report.write_html(tmp_path / "plan.html", made_plan, price=1.0).read_text()
    lines = [str(escape(line.strip())) for line in text.splitlines()]
    assert page.count("<svg") == 1 and [line for line in lines if line not in page] == [escape("sft-update: " + f.about)]


def test_decoding_for_a_slice_that_is_not_there(cache):
    """Narrow, on v5e:2x2: nothing as large as the cache is copied, no weight is gathered in the loop."""
    (f,) = made(narrow.grpo(), "v5e:2x2", ["rollout"], cache).analyses
    found = verdicts(f, "v5e:2x2")
    held = (
        "memory",
        "loops understood",
        "cache updated in place",
        "copies as large as a layer's cache",
        "weights gathered in the decoding loop",
    )
    for name in held:
        assert found[name][0], found[name]
    assert f.steps in f.loops


def test_the_decoder_gathers_weights_and_exchanges_no_activations(cache):
    """Narrow, on simulated devices: within the MMDiT's blocks weights are gathered, each once a step, and what else is exchanged is less
    than the smallest activation."""
    (f,) = made(narrow.grpo("mmdit.unroll=1", "mmdit.n_double=2"), "cpu:4", ["decoder"], cache).analyses
    inside = [r for r in f.collectives if re.search("MMDiT/while/body|(double|single)_blocks", r["source"])]
    weights = [r for r in inside if r["kind"] == "all-gather"]
    assert {a for r in weights for a in r["axes"]} == {"fsdp", "tensor"}
    # Of what a device lacks of two steps' weights; those of modulations are split instead, as for any tensor parallelism, and with
    # jax 0.12 the CPU's compiler splits those of attention too.
    assert 0.2 < sum(r["sent"] for r in weights) / (0.75 * f.gathered) < 1
    modulations = 16 * 6 * 128 * 4  # six vectors of width 128 for each of 16 images, float32
    assert max(r["bytes"] / r["times"] for r in inside if r["kind"] != "all-gather") <= modulations
    assert verdicts(f, "cpu:4")["sent / weights"][0]


def test_a_decoder_on_devices_of_its_own(cache):
    """Both meshes, and what stays on each; on a slice both parts are planned as slices."""
    apart = narrow.grpo("mesh.tensor=1", "decoder_mesh.fsdp=2", "rollout.chunks=2")
    made_plan = made(apart, "cpu:4", ["text", "prefill"], cache)
    text, first = made_plan.analyses
    assert (text.on_decoder_mesh, text.devices, first.on_decoder_mesh, first.devices) == (True, 2, False, 2)
    stage = plan.programs_on(apart, CPU)
    held = lambda *names: sum(abstract.bytes_per_device(stage.persistent[name]) for name in names)  # noqa: E731
    assert text.persistent == held("siglip_vq") and first.persistent == held("params", "optimizer", "reference")
    assert set(stage.decoder_mesh.devices.flat).isdisjoint(stage.mesh.devices.flat)
    assert "mesh fsdp 2 and, for the decoder, fsdp 2" in report.head(made_plan)
    slices = plan.programs_on(narrow.grpo("decoder_mesh.fsdp=8", "batch_size=8"), chips.parse("v6e:4x4"))
    assert (slices.mesh.size, slices.decoder_mesh.size) == (8, 8) and {d.device_kind for d in slices.decoder_mesh.devices.flat} == {
        "TPU v6 lite"
    }
    with pytest.raises(
        ConfigError, match=r"v6e:4x4 \(16 devices\): 5 of 16 devices apart: 4 processes with at least 4 devices each allow 4, 8, 12"
    ):
        plan.programs_on(narrow.grpo("decoder_mesh.fsdp=5"), chips.parse("v6e:4x4"))


def test_a_decoder_apart_works_beside_the_rollout():
    """Two chunks: the first is decoded while the second is sampled."""
    topology, memory = chips.parse("v6e:2x2"), dict(peak=0)
    rows = [("layout", 1, 1, False), ("rollout", 10, 2, False), ("decoder", 4, 2, True), ("policy-update", 7, 1, False)]
    analyses = [
        fake(program=program, hbm=seconds * topology.chip.bandwidth, per_step=times, on_decoder_mesh=apart, memory=memory)
        for program, seconds, times, apart in rows
    ]
    step = roofline.step(plan.Plan("grpo", topology, {}, {}, {}, analyses, [], True), price=None)
    assert (step.overlapped, step.seconds) == (4, 1 + 20 + 8 + 7 - 4)


@pytest.mark.parametrize(
    "seconds, text", [(123.4, "123 s"), (1.0, "1 s"), (0.9994, "999 ms"), (0.0456, "45.6 ms"), (7.89e-6, "0.00789 ms")]
)
def test_a_time_is_never_rounded_to_nothing(seconds, text):
    assert report.duration(seconds) == text


def test_what_a_small_model_cannot_show_is_not_checked():
    """Weights below a GiB, of which norms and biases are a large part; an output head as wide as a layer."""
    updated = dict(memory=dict(aliased=1, peak=0), state=1, learned=1e15, program="sft-update", fsdp=4)
    names = lambda **more: {c.name for c in checks(fake(**updated | more), CPU)}
    telling = {"positions with logits at once", "FSDP bytes / theory"}
    assert telling <= names(gathered=2 * GIB, vocabularies=(512,)) and not telling & names(gathered=GIB / 2, vocabularies=())
    for widths, kept in (((384, 100), (512,)), ((128, 512), (384,)), ((64, 65), (384, 512))):
        ar = dataclasses.replace(PRESETS["tiny"], vocab_size=384, image_vocab_size=512, mlp_dim=widths[0], d_model=widths[1])
        assert work.telling(ar, ar.vocab_size, ar.image_vocab_size) == kept


def fake(**changes):
    """The analysis of a program that was never compiled."""
    fields = {f.name: 0 for f in dataclasses.fields(plan.ProgramAnalysis)} | dict(
        program="policy-update", about="", key="k", memory=None, needs=40 * GIB, devices=4, per_step=1,
        flops=dict(weights=1e15, attention=0.0, convolution=0.0, kernels=0.0), copies=[], collectives=[], repeated=[],
        loops=[], unknown=[], logits=(),
    )  # fmt: skip
    return plan.ProgramAnalysis(**fields | changes)


def test_a_proposal_is_what_was_compiled_and_fits(monkeypatch, tmp_path):
    """The first change with which it fits, in the order of what it costs the run."""
    asked = []

    def analyse_program(name, made, topology, cache):
        asked.append(made[name].about)
        return fake(needs=int((40 if len(asked) < 2 else 10) * GIB))

    monkeypatch.setattr(plan, "analyse_program", analyse_program)
    monkeypatch.setattr(chips, "devices", lambda topology: jax.devices()[:4])
    (found,) = plan.propose_for(narrow.grpo("accumulate=1"), fake(), chips.parse("v6e:2x2"), tmp_path, 0.06, True)
    assert found.overrides == ("accumulate=4",) and found.needs == 10 * GIB
    assert "in 2 micro-batches" in asked[0] and "in 4 micro-batches" in asked[1]


def test_a_proposal_for_real(cache, monkeypatch):
    """Smaller chunks, found by compiling them, when the first chunk does not fit."""
    (f,) = made(narrow.grpo(), "cpu:4", ["prefill"], cache).analyses
    monkeypatch.setattr(plan, "budget", lambda topology, reserve: f.fits_in - 1)
    found = plan.make_plan(narrow.grpo(), CPU, ["prefill"], cache, quiet=True)
    (proposal,) = found.proposals
    assert proposal.overrides == ("rollout.chunks=2",) and proposal.needs < f.fits_in
    (again,) = made(narrow.grpo(*proposal.overrides), "cpu:4", ["prefill"], cache).analyses
    assert again.fits_in == proposal.needs
    assert "prefill would fit in 0.0 GiB with --config.rollout.chunks=2 (compiled)" in report.text(found)


def test_gates_write_their_table_and_notice_a_drift(tmp_path, monkeypatch):
    monkeypatch.setattr(gates, "FOLDER", tmp_path)
    (tmp_path / "grpo.py").write_text("")
    (tmp_path / "README.md").write_text(f"before\n{gates.BEGIN}\nstale\n{gates.END}\nafter\n")
    memory = dict(arguments=0, outputs=0, temporaries=GIB, aliased=0, peak=2 * GIB)
    monkeypatch.setattr(gates, "GATES", (gates.Gate("grpo", "v6e-64"),))
    monkeypatch.setattr(gates, "plans", lambda *a: [fake(program="vae", memory=memory)])
    gates.run(tmp_path, None, 0.06)
    text = (tmp_path / "README.md").read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "stale" not in text and "| grpo v6e-64 | vae | 2.00 |" in text
    records = gates.GateRecords(tmp_path / "gates.json")
    records.add(gates.GATES[0], fake(program="vae", memory=memory | dict(peak=3 * GIB)), 0.06)
    assert [line for line in records.missed if "peak drifted" in line]


def test_the_table_says_what_the_numbers_say_and_what_is_missing():
    numbers = json.loads((ROOT / "configs" / "xomni" / "gates.json").read_text())
    assert f"{gates.BEGIN}\n{gates.table(numbers)}{gates.END}" in (ROOT / "configs" / "xomni" / "README.md").read_text()
    stages = {"grpo": narrow.grpo, "sft": narrow.sft}
    assert {name: tuple(plan.programs_on(config(), CPU).programs) for name, config in stages.items()} == gates.PROGRAMS


def test_an_impossible_mesh_is_refused_with_the_sizes_that_would_work():
    with pytest.raises(
        ConfigError, match="config.mesh.tensor=4: 2 key and value heads do not split 4 ways; use 1, 2, and fsdp for the rest"
    ):
        plan.programs_on(narrow.grpo("mesh.tensor=4"), CPU)
    with pytest.raises(ConfigError, match=r"cpu:4 \(4 devices\): mesh fsdp=3 x tensor=2 needs 6 devices, 4 are present"):
        plan.programs_on(narrow.sft("mesh.fsdp=3"), CPU)


@pytest.mark.parametrize(
    "line, words",
    [
        ("--config=configs/tiny/sft.py --topology=v9-4", "topology 'v9-4' is unknown; known are v4:{2x2x1,"),
        ("--config=configs/none.py --topology=cpu:8", "configs/none.py: no such config file"),
        ("--config=configs/tiny/sft.py", "--config and --topology are needed"),
        ("--config=configs/tiny/sft.py --topology=cpu:8 --price 0", "--price 0 must be above 0"),
        ("--config=configs/tiny/sft.py --topology=cpu:8 --reserve 1", "--reserve 1 is a share of HBM"),
        ("--config=configs/tiny/sft.py --topology=cpu:8 --json /no/such/a.json", "there is no folder /no/such; make it first"),
        (
            "--config=configs/tiny/sft.py --topology=cpu:2 --program rollout",
            "--program rollout: stage sft has no such program; it has sft-update, and all",
        ),
        (
            "--config=configs/tiny/grpo.py --config.init_from=no/model --topology=cpu:8",
            "config.transformer.preset=stored, but no/model holds no transformer",
        ),
        ("--gates --program vae", "--gates plans the released configurations as they are"),
        ("--gates --topology v6e:2x2", "no gate is on it; they are on v5p-64, v6e-64, v5e-256"),
    ],
)
def test_errors_are_one_sentence(line, words, capsys):
    assert main(["plan", *line.split()]) == 2
    err = capsys.readouterr().err.splitlines()
    assert len(err) == 1 and words in err[0], err
