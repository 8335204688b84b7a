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
            "sampling_option": {
                "resolution": "32px",
                "aspect_ratio": "1:1",
                "height": placeholder(int),
                "width": placeholder(int),
                "num_frames": 9,
                "num_steps": 25,
                "shift": True,
                "flow_shift": 1.0,  # as in training: three latent frames of 16 tokens need no shift
                "guidance": 3.0,
                "guidance_img": placeholder(float),
                "text_osci": False,
                "image_osci": False,
                "scale_temporal_osci": False,
                "method": "i2v",
                "seed": 42,
            },
            "add_fps_to_text": False,  # the captions of the demo set end without one
            "motion_score": placeholder(str),
            "fps_save": 8.0,
            "mesh": {"data": -1, "fsdp": 1, "seq": 1, "tensor": 1, "seq_method": "ulysses"},
            "model": trained.model.to_dict() | {"from_pretrained": folder + "/diffusion"},
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
