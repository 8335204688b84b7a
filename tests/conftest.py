"""The setting of all tests: a CPU as 8 devices, exact float32 products, compiled programs kept between runs.

It is made through jax.config rather than the environment, so that commands started by tests see one device.
Warnings are errors (pyproject.toml). Tests marked `slow` run too; `-m "not slow"` leaves them out.
"""

import os
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"  # for the commands that tests start as well

import jax

CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "opensora_jax" / "jax-tests"

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_default_matmul_precision", "highest")
jax.config.update("jax_compilation_cache_dir", os.environ.get("JAX_COMPILATION_CACHE_DIR", str(CACHE)))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
