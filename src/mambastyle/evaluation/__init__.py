"""Measuring: metrics are pure functions, protocols say which pictures, which size and how many."""
