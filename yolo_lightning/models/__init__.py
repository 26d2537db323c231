"""Networks: layers, backbones, YOLOv2, and anchor clustering."""
