"""From configuration to stored videos: plan, generate, time, store."""
