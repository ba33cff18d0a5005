# Copies kernel modules with all they depend on into an initramfs tree, and lists them in loading order.
# usage: copy_modules TREE MODULE...   (run where cache/kernel is)
copy_modules() {
    local tree=$1 version module file
    shift
    version=$(cat cache/kernel/version)
    mkdir -p "$tree/mod" && : > "$tree/mod/order"
    for module in "$@"; do
        modprobe -d cache/kernel -S "$version" --show-depends "$module" 2>/dev/null | awk '$1=="insmod"{print $2}' || true
    done | awk '!seen[$0]++' | while read -r file; do
        module=$(basename "$file"); module=${module%.xz}; module=${module%.zst}
        case $file in
            *.xz) xz -dc "$file" > "$tree/mod/$module" ;;
            *.zst) zstd -qdc "$file" > "$tree/mod/$module" ;;
            *) cp "$file" "$tree/mod/$module" ;;
        esac
        strip -g "$tree/mod/$module"
        echo "$module" >> "$tree/mod/order"
    done
}

# A tree with a static busybox and all its applets.
busybox_tree() {
    local tree=$1 applet
    mkdir -p "$tree"/{bin,etc,proc,sys,dev,tmp,root,run,mnt}
    cp "$(command -v busybox)" "$tree/bin/busybox"
    for applet in $("$tree/bin/busybox" --list); do
        [ "$applet" = busybox ] || ln -sf busybox "$tree/bin/$applet"
    done
}
