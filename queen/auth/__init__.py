"""Who a request comes from and what they may do: tokens, the keys they are verified with, levels. No HTTP is served."""
