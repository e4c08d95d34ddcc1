"""Commands for the disks that tensors are offloaded to: ``ds_io`` measures one pattern, ``ds_nvme_tune`` finds the best."""
