"""What the broker decides: batching, waiting, leases, retries. No HTTP, no SQL."""
