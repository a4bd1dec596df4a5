"""What tests share: tiny models, pairs of them, ranks, closeness."""
