"""X-Omni in JAX: discrete autoregressive image generation, trained with reinforcement learning."""
