"""ROS: what is in its messages, without ROS.

`messages` reads point clouds and images out of messages of ROS 1 and 2, however they were deserialised. ``node`` is a
ROS 2 node that asks a server, and needs rclpy.
"""
