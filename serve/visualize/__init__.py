"""Draw detections on point clouds and images."""
