"""What travels: frames, batches of frames, images, calibrations. No torch, no server."""
