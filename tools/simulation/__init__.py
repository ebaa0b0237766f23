"""Discrete-event simulation of gateways, workers and bursts, for questions that one machine cannot answer."""
