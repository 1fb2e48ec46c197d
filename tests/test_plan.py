"""``plan`` from meta tensors, against what real runs of twins are counted to take, and against formulas."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import attrs
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import profile
from torch.utils.flop_counter import FlopCounterMode

import reward_families
from families import clip_architecture, write_clip
from pipelines import KINDS, pipeline_record, write_pipeline
from stitchvm import core
from stitchvm.core.branch import Interface
from stitchvm.core.images import open_images
from stitchvm.core.planning.metered_networks import MeteredBackbone, MeteredReward
from stitchvm.core.planning.metering import metered
from stitchvm.core.planning.run import Plan, PlanSettings, plan, plan_networks
from stitchvm.core.sampling import Denoiser, sample, seeded_noise
from stitchvm.core.stitching.beginnings import initial_value
from stitchvm.core.stitching.examples import build_examples, from_images
from stitchvm.core.stitching.finetune import finetune
from stitchvm.core.stitching.finetune_settings import FinetuneSettings

# every backbone family and every reward family
PAIRS = [
    ("sd3.5-medium", "clip-vit-l-14"),
    ("flux-dev", "siglip2-so400m-14-378"),
    ("sd1.5", "aesthetic"),
    ("sdxl", "dinov2-vit-l-14-reg4"),
    ("sd3-medium", "hpsv2"),
]
SETTINGS = PlanSettings(cut=2, block=2, probes=12, probe_batch=4, images=4, cache_batch=4, batch=4, rollouts=2, steps=3)


def counted(run: Callable[[], object]) -> int:
    """FLOPs of a real run by torch's own counter, with attention written out in matrix products."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        # the Gram matrices' products are added in place, which torch's counter passes over
        inplace = {torch.ops.aten.addmm_: lambda _, a, b, *__, **___: 2 * math.prod(a) * b[-1]}
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False, custom_mapping=inplace) as counter:
            run()
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    return counter.get_total_flops()


def records(pair: tuple[str, str]) -> tuple[core.BackboneRecord, core.RewardRecord]:
    return core.registry().backbone(pair[0]), core.registry().reward(pair[1])


def planned(pair: tuple[str, str], settings: PlanSettings = SETTINGS) -> Plan:
    """The plan of two twins."""
    backbone, reward = (core.build_twin(record).to_meta() for record in records(pair))
    return plan_networks(backbone, reward, settings)


def real_runs(pair: tuple[str, str], taps: tuple[int, ...], folder: Path) -> dict[str, int]:
    """What the jobs of a plan take when twins really do them."""
    backbone, reward = (core.build_twin(record) for record in records(pair))
    side = backbone.native_resolution
    source = open_images(list(torch.rand(12, 3, side, side, generator=torch.Generator().manual_seed(0))))
    compared = reward.condition(reward_families.compared(reward))
    condition, null = backbone.encode_prompts(["a cat"]), backbone.null_condition()
    backbone.encode_images(torch.zeros(1, 3, side, side))  # opens the VAE
    latents = seeded_noise([0], (backbone.latent_channels, *[side // backbone.latent_factor] * 2), "cpu")
    denoiser = Denoiser(backbone, condition, null, 1.0 if backbone.guided_passes == 1 else 3.0)
    context = core.Prompted(denoiser, compared)
    counts, found = {}, {}

    def search() -> None:
        found["search"] = core.search(
            backbone, reward, images=source.items, taps=taps, probes=12, batch=4, resolution=side, progress=False
        )

    counts["search"] = counted(search)
    value = initial_value(backbone, reward, found["search"], Interface(2, 2))
    counts["value"] = counted(lambda: value(latents, 0.5, compared))
    tweedie = core.Tweedie(reward)
    counts["tweedie"] = counted(lambda: tweedie(latents, torch.tensor(0.5), context))
    prediction = denoiser(latents, 0.5)
    counts["tweedie_given"] = counted(lambda: tweedie(latents, torch.tensor(0.5), context, prediction))
    sigmas = backbone.sigmas(3, latents.shape[-2:])

    def monte_carlo() -> None:
        for _ in range(2):
            core.clean_reward(sample(denoiser, latents, sigmas), context, reward)

    counts["monte_carlo"] = counted(monte_carlo)

    def cache() -> None:
        batches = from_images(backbone, source, 4, side, 4)
        found["cache"] = build_examples(folder, batches, {value.names[0]: reward}, {}, 4, label="", progress=False)

    counts["cache"] = counted(cache)
    recipe = FinetuneSettings(steps=1, batch_size=4)
    counts["epoch"] = counted(lambda: finetune(value, found["cache"], recipe, progress=False))
    return counts


@pytest.mark.parametrize(("pair", "taps"), [*((pair, ()) for pair in PAIRS), (("sd1.5", "aesthetic"), (0, 1, 3))])
def test_planned_flops_are_those_of_real_runs(pair, taps, tmp_path):
    """Exact without a gradient; the fused attention that is planned with computes its scores again going back."""
    jobs, real = planned(pair, attrs.evolve(SETTINGS, taps=taps)).jobs, real_runs(pair, taps, tmp_path)
    assert set(jobs) == set(real)
    for name, count in real.items():
        assert jobs[name].flops == pytest.approx(count, rel=0.1 if name == "epoch" else 1e-9), name


def test_the_whole_vit_h_is_its_formula():
    """ViT-H/14 at 224 pixels: 257 tokens of 1280 in 32 layers, two FLOPs a multiply and add."""
    tokens, width = 257, 1280
    block = 2 * tokens * 12 * width**2 + 4 * tokens**2 * width
    stem, exit_ = 2 * 256 * 3 * 14**2 * width, 2 * width * 1024
    cost = MeteredReward.of(core.build_geometry(core.registry().reward("hpsv2")))
    assert cost.whole.flops == stem + 32 * block + exit_
    assert [cost.tail_flops(j) for j in (1, 4)] == [(33 - j) * block + exit_ for j in (1, 4)]
    assert cost.whole.bytes == 4 * 632_076_800


def test_the_whole_sd3_is_its_formula():
    """SD 3 Medium at 1024 pixels: 4096 image and 333 text tokens of 1536 in 24 joint blocks, the last without text."""
    image, text, width, pooled = 4096, 77 + 256, 1536, 2048
    both = image + text
    attention = 4 * both**2 * width
    block = 2 * both * 12 * width**2 + attention + 2 * 2 * width * 6 * width
    # the last block's text is modulated in two ways and asked for queries, keys and values alone
    last = 2 * image * 12 * width**2 + 2 * text * 3 * width**2 + attention + 2 * width * (6 + 2) * width
    stem = 2 * image * 16 * 4 * width + 2 * text * 4096 * width
    stem += 2 * (256 * width + width**2) + 2 * (pooled * width + width**2)
    exit_ = 2 * width * 2 * width + 2 * image * width * 64
    cost = MeteredBackbone.of(core.build_geometry(core.registry().backbone("sd3-medium")))
    assert [head.flops for head in cost.heads] == [stem + k * block for k in range(24)] + [stem + 23 * block + last]
    assert cost.whole.flops == stem + 23 * block + last + exit_
    assert cost.whole.parameters == 2_028_328_000


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_planned_bytes_are_those_of_loaded_tensors(kind, dtype, tmp_path):
    """The storage of every tensor that loading a head, a whole backbone or a VAE leaves in memory."""
    write_pipeline(tmp_path, kind)
    record = attrs.evolve(pipeline_record(tmp_path, kind), dtype=dtype)
    whole = core.load_backbone(record)
    whole.encode_images(torch.zeros(1, 3, 16, 16))
    cost = MeteredBackbone.of(core.load_backbone(record).to_meta(), 16)
    assert cost.whole.bytes == pytest.approx(stored(whole.net), rel=0.1)
    for cut in (0, 1, whole.depth):
        loaded = core.load_backbone(record, cut=cut)
        assert cost.heads[cut].bytes == pytest.approx(stored(core.Head(loaded, cut)), rel=0.1)
    vae = whole.companions.vae(torch.device("cpu"))
    assert cost.encoder.bytes + cost.decoder.bytes == pytest.approx(stored(vae), rel=0.1)


def test_planned_bytes_of_a_reward_are_those_of_its_tensors(tmp_path):
    write_clip(tmp_path, clip_architecture())
    reward = core.load_reward(str(tmp_path), family="clip")
    cost = MeteredReward.of(reward.to_meta())
    assert cost.whole.bytes == pytest.approx(stored(reward.net), rel=0.1)


def stored(module: torch.nn.Module) -> int:
    """Bytes of the storages behind a module's tensors, each once."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in module.state_dict().values()}
    return sum(storage.nbytes() for storage in storages.values())


@pytest.mark.parametrize("kind", ["sd3.5-medium", "sd1.5", "clip-vit-l-14"])
def test_activations_are_what_the_allocator_sees(kind):
    """The profiler watches the allocator of a real run: the most that was allocated at once."""
    registry = core.registry()
    twin = core.build_twin(registry.backbone(kind) if kind in registry.backbones else registry.reward(kind))
    meta = twin.to_meta()
    (x, condition), inputs = twin.example(4), meta.example(4)
    with torch.no_grad():
        with metered() as cost:
            meta.resume(meta.head(*inputs, 0), 0)
        with profile(profile_memory=True) as seen:
            twin.resume(twin.head(x, condition, 0), 0)
    live, peak = 0, 0
    for event in sorted(memory_events(seen)):
        live += event[1]
        peak = max(peak, live)
    assert cost.peak == pytest.approx(peak, rel=0.02)


def memory_events(seen: profile) -> list[tuple[int, int]]:
    """``(nanosecond, bytes)`` of everything that was allocated (or freed, negative)."""
    events = seen.profiler.kineto_results.events()
    return [(event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]"]


def test_an_estimate_grows_with_its_latents_and_its_batch():
    pair = ("sd1.5", "clip-vit-l-14")
    plain, larger = planned(pair), planned(pair, attrs.evolve(SETTINGS, resolution=64))
    assert larger.resolution == 2 * plain.resolution
    assert larger.parts["denoiser"].flops > 3.5 * plain.parts["denoiser"].flops
    assert larger.parts["denoiser"].bytes == plain.parts["denoiser"].bytes
    assert larger.parts["tail"] == plain.parts["tail"]
    deeper = planned(pair, attrs.evolve(SETTINGS, cut=10))
    assert deeper.jobs["value"].flops > plain.jobs["value"].flops
    assert deeper.jobs["tweedie"] == plain.jobs["tweedie"]


def test_the_largest_batch_is_the_last_that_fits():
    need = planned(PAIRS[0]).jobs["epoch"]
    for capacity in (need.fixed + 3 * need.sample, need.fixed + 4 * need.sample - 1):
        assert need.largest_batch(capacity) == 3
    assert need.largest_batch(need.fixed - 1) == 0
    assert attrs.evolve(need, batch=3).memory == need.fixed + 3 * need.sample


@pytest.mark.parametrize(
    ("settings", "error", "said"),
    [
        ({"resolution": 1001}, core.SliceError, "resolution is 1001; choose a multiple of 8 pixels"),
        ({"resolution": 4096}, core.SliceError, "at most 384"),
        ({"taps": (24,)}, core.SliceError, "tap 24 is not before the cut at 24"),
        ({"cut": 25}, core.SliceError, "cut 25 is out of range"),
        ({"block": 99}, core.SliceError, "cut 98 is out of range"),
        ({"images": 0}, core.ConfigError, "'images' must be > 0"),
        ({"image": 3}, core.ConfigError, "unexpected keyword argument 'image'"),
    ],
)
def test_a_plan_that_cannot_be_made(settings, error, said):
    with pytest.raises(error, match=said):
        plan("sd3-medium", "clip-vit-l-14", **settings)


@pytest.fixture
def run(run):
    return partial(run, "plan")


def test_the_command_plans_flux_in_seconds(run):
    started = time.process_time()
    code, out, _ = run("flux-dev", "hpsv2", "--gpu-memory", "24", "--json")
    assert time.process_time() - started < 60
    report = json.loads(out)
    assert code == 0
    assert report["parts"]["denoiser"]["parameters"] == 11_901_408_320
    assert report["parts"]["denoiser"]["bytes"] == pytest.approx(2 * 11_901_408_320, rel=1e-3)
    assert report["passes"] == 1, "its guidance is embedded"
    assert len(report["heads"]) == 58
    assert report["fits"]["value"] >= 1, "half of the backbone fits where the whole does not"
    assert report["fits"]["tweedie"] == 0


def test_the_command_prints_a_table(run):
    code, out, _ = run("sd1.5", "aesthetic", "--gpu-memory", "8", "--images", "1000", "--batch", "64")
    assert code == 0
    assert "aesthetic stitched to sd1.5 at 512 pixels, cut after block 14 and before block 1" in out
    assert "Monte Carlo: 4 rollouts of 28 steps" in out
    assert "finetune: an epoch of 1,000 images" in out
    assert "in 8 GB" in out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("sd1.5", "hpsv3"), "unknown reward 'hpsv3'. Did you mean 'hpsv2'?"),
        (("sd1.5", "hpsv2", "--gpu-memory", "0"), "--gpu-memory is 0; give a positive number of gigabytes"),
        (("sd1.5", "hpsv2", "--cut", "77"), "cut 77 is out of range; choose 0 to 28"),
    ],
)
def test_a_mistake_is_one_line(run, arguments, said):
    code, out, err = run(*arguments)
    assert (code, out) == (2, "")
    assert err.count("\n") == 1
    assert said in err
