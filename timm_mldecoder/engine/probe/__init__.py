"""Train heads on a frozen backbone side by side, and compare them."""
