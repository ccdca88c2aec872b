"""What a policy acts in: one answer to a prompt, or an episode of many steps."""
