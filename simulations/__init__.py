"""Many hospitals on one machine: engines, partitions, generated images, comparisons and `flower-simulate`."""
