"""DQN, PPO and random on one `base`: what they know, keep and explore."""
