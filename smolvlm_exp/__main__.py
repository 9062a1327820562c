from smolvlm_exp.main import main

main()
