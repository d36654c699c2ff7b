"""DQN, PPO and random: what they know, keep and explore."""
