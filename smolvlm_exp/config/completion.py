"""Completion in bash, for `smolvlm-exp` and for `python -m smolvlm_exp`, which Hydra's own does not know.

eval "$(python -m smolvlm_exp -sc install=bash)"
"""

BASH = r"""
smolvlm_exp_completion() {
    local line="${COMP_LINE:0:COMP_POINT}" ask
    if [[ "$line" =~ ^([^ ]*python[0-9.]*)\ +-m\ +smolvlm_exp\ +(.*)$ ]]; then
        ask="${BASH_REMATCH[1]} -m smolvlm_exp"
    elif [[ "$line" =~ ^([^ ]*smolvlm-exp)\ +(.*)$ ]]; then
        ask="${BASH_REMATCH[1]}"
    else
        return
    fi
    line="smolvlm-exp ${BASH_REMATCH[2]}"
    COMPREPLY=($(compgen -W "$(COMP_LINE="$line" $ask -sc query=bash 2> /dev/null)" -- "${line##* }"))
}
COMP_WORDBREAKS=${COMP_WORDBREAKS//=}
complete -o nospace -o default -F smolvlm_exp_completion smolvlm-exp python python3
"""
