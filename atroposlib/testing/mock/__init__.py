"""Parts of the mock inference server: HTTP, wires, policies, faults. Use atroposlib.testing.mock_inference."""
