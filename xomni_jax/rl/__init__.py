"""Reinforcement learning: rollouts, rewards, advantages, objectives and the update."""
