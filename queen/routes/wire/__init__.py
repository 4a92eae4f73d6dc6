"""JSON on the wire ↔ the model: the only room that knows camelCase and the sentences of the contract's refusals.

Requests are decoded once, typed, with each payload left as the bytes it came in. Where that fails, a second and slower
reading finds out which sentence applies; it never builds a payload either. Answers are formatted, not encoded: what
the messages of an answer share is made once. No engine call and no status code lives here.
"""
