"""Every case file of the goldens folders against our code: `python -m pytest tests/parity --goldens DIR`.

A case is recognised by the prefix of its name, the longest wins; a manifest by its content. A file that neither table
knows fails. The table of all cases is printed at the end of the run.
"""

from pathlib import Path

import pytest

from tests.parity import (
    api,
    autoencoder,
    critics,
    data,
    dc_ae,
    denoise,
    flux_ae,
    hunyuan_blocks,
    manifests,
    mmdit,
    opensora_vae,
    optimizer,
    quality,
    sampling,
    text,
    tiling,
    train_step,
    weights,
)
from tests.parity.cases import Driver, discover, run

DRIVERS: dict[str, Driver] = {
    "mmdit_": mmdit.network,
    "mmdit_embeddings": mmdit.embeddings,
    "mmdit_small_layers": mmdit.small_layers,
    "denoise_": denoise.trajectory,
    "api_": api.whole_run,
    "schedules": sampling.schedules,
    "pack_prepare": sampling.packing,
    "inference_condition": sampling.masks,
    "weights_fused_to_split": weights.layouts,
    "text_t5": text.t5,
    "text_clip_": text.clip,
    "train_step_": train_step.step,
    "batch_loss": train_step.batch_loss,
    "visual_condition_": train_step.visual_condition,
    "aspect": data.aspect_ratios,
    "buckets": data.bucket_tables,
    "text_and_frames": data.text_and_frames,
    "transforms": data.pixels,
    "hunyuan_vae_": autoencoder.hunyuan_vae,
    "hunyuan_vae_blocks": hunyuan_blocks.blocks,
    "hunyuan_vae_tiling": tiling.hunyuan_vae,
    "dcae_blocks": dc_ae.blocks,
    "dcae_core": dc_ae.network,
    "dcae_tiling": tiling.dcae,
    "flux_ae": flux_ae.flux_ae,
    "opensora12_vae_temporal": opensora_vae.temporal,
    "opensora12_vae_pipeline": opensora_vae.pipeline,
    "lpips_small": critics.lpips_small,
    "lpips_full_seeded": critics.lpips_full,
    "discriminator": critics.discriminator,
    "vae_loss": critics.vae_loss,
    "adam_update": optimizer.adam,
    "lr_schedules": optimizer.schedules,
    "ema": optimizer.average,
    "metrics": quality.metrics,
    "vae_stats": quality.latents,
    "manifest:LPIPS": manifests.published,
    "manifest:N_Layer_discriminator_3D": manifests.published,
    "manifest:dc_ae": dc_ae.manifest,
    "manifest:autoencoder_2d": manifests.published,
    "manifest:VideoAutoencoderPipeline": opensora_vae.manifest,
    "manifest:mmdit": manifests.published,
    "manifest:t5": manifests.published,
    "manifest:clip": manifests.published,
    "manifest:hunyuan_vae": manifests.published,
}

STDIT3, GAN = "STDiT3 of Open-Sora 1.2", "GAN training of autoencoders"

PENDING: dict[str, str] = {
    # prefix: the work that it belongs to
    "rflow_v12_": STDIT3,
    "stdit3_": STDIT3,
    "manifest:stdit3": STDIT3,
    "gan_losses": GAN,
    "vae_train_step": GAN,
}


def folders(config: pytest.Config) -> list[Path]:
    return [Path(folder) for folder in config.getoption("--goldens")]


def pytest_generate_tests(metafunc):
    cases = discover(folders(metafunc.config))
    metafunc.parametrize("case", cases, ids=[case.id for case in cases])


def test_parity(case, record_property, pytestconfig):
    result, faults = run(case, DRIVERS, PENDING, folders(pytestconfig))
    record_property("parity", list(result))
    if result.verdict == "pending":
        pytest.xfail(f"pending: {result.note}")
    assert not faults, "\n".join([case.id, *faults])
