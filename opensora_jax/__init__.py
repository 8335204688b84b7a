"""Open-Sora 2.0 in JAX: text and image to video, on TPU pods, GPUs and laptops. See docs/layout.md."""
