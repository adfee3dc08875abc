"""What the tests share: tiny models, rewards, a stand-in for a GPU."""
