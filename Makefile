.PHONY: setup check check-long train

setup: ## the virtual environment .venv, ready to run and to check
	bash test/setup.sh --dev

check: ## every check and test, exactly as CI runs them
	bash test/run_tests.sh

check-long: ## and the tests that take minutes
	bash test/run_tests.sh --long

train: ## the main job, on made-up data
	bash test/train_full_1p.sh
