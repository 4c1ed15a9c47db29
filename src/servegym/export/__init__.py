"""Policy files: ONNX graph and manifest."""
