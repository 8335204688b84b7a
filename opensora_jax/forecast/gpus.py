"""What CUDA's compiler has to know of a GPU that is not here, in the text form of XLA's `GpuTargetConfigProto`.

Source: openxla/xla, `xla/tools/hlo_opt/gpu_specs/h100_sxm.txtpb`; sizes and bandwidths of nvidia.com data sheets.
"""

from opensora_jax.forecast.chips import Chip

HOPPER = """
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
  threads_per_core_limit: 2048
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  memory_bandwidth: {bandwidth}
  device_memory_size: {memory}
  cuda_compute_capability {{ major: 9 }}
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 7 }}
runtime_version {{ major: 12 minor: 8 patch: 0 }}
device_description_str: "{kind}"
"""


def target_config(chip: Chip) -> str:
    """Returns the description of a GPU."""
    return HOPPER.format(bandwidth=int(chip.hbm_gbps * 1e9), memory=chip.memory_bytes, kind=chip.kind)
