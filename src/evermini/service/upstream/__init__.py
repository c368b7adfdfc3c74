"""Models that another engine runs: requests go there in its words, answers come back in ours."""
