"""A trained model over HTTP: OpenAI's paths for what writes, plain ones for tasks; limits, keys, filters, an audit log."""
