"""The hospital's side: ClientApp, images, training, policy, ledger, the one door out and `flower-client`."""
