"""Credit: how much each response, or token, is better than its baseline."""
