r"""Samples with the models that launch/demo.sh trains: 9 small frames, on a CPU in seconds.

    python -m opensora_jax.sample --config=configs/diffusion/inference/demo.py \
        --prompt="a red circle moves up on a dark background"

Expected: videos and contact_sheet.png in outputs/demo/samples; 24 prompts take seconds once compiled.
`--config.folder=...` moves all inputs and outputs of the demo at once.
"""

from ml_collections import ConfigDict, FieldReference
from ml_collections.config_dict import placeholder

from configs.diffusion.train import demo as train


def get_config() -> ConfigDict:
    folder = FieldReference("outputs/demo")
    trained = train.get_config()
    trained.folder = folder
    return ConfigDict(
        {
            "folder": folder,
            "save_dir": folder + "/samples",
            "batch_size": 8,
            "decode_batch_size": 8,
            "dtype": "float32",
            "cond_type": "t2v",
            "dataset": {"data_path": placeholder(str)},
            "start_index": 0,
            "num_samples": placeholder(int),
            "num_sample": 1,
            "sampling_option": trained.preview.sampling_option,
            "add_fps_to_text": False,  # the captions of the demo set end without one
            "motion_score": placeholder(str),
            "fps_save": 8.0,
            "mesh": {"data": -1, "fsdp": 1, "seq": 1, "tensor": 1, "seq_method": "ulysses"},
            "distributed": trained.distributed,
            "model": trained.model.to_dict() | {"from_pretrained": folder + "/diffusion", "adapter": placeholder(str)},
            "ae": trained.ae,
            "t5": trained.t5,
            "clip": trained.clip,
            # Text to image to video: t2i2v_256px.py
            "use_t2i2v": False,
            "img_flux": None,
            "img_flux_ae": None,
            "img_resolution": placeholder(str),
        }
    )
