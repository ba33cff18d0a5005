# Ring 0, all of it: the way up from the PVH entry to ring 3, the services ring 3 asks for,
# and the entries for interrupts and exceptions. Some KVMs emulate ring 0 slowly and incompletely, so this
# uses plain instructions only and does as little as it can; everything else is Rust in ring 3.

.set KERNEL_CODE, 0x08
.set KERNEL_DATA, 0x10
.set CODE32,      0x18
.set USER_DATA,   0x23
.set USER_CODE,   0x2b
.set STACK_SIZE,  0x10000

.section .note.pvh, "a", @note
.align 4
.long 4, 8, 18                  # name size, value size, XEN_ELFNOTE_PHYS32_ENTRY
.asciz "Xen"
.quad pvh_start

.section .boot, "ax"
.code32
.global pvh_start
pvh_start:                      # 32-bit protected mode, no paging, ebx = struct hvm_start_info
    cli
    cld
    movl %ebx, start_info
    lgdt gdt_pointer
    xorl %edi, %edi             # edi = index of this vCPU
    jmp to_long_mode

# The application processors' first instructions; copied to AP_PAGE below 1 MiB, entered in real mode.
.code16
.global ap_page
.global ap_page_end
ap_page:
    cli
    cld
    xorw %ax, %ax
    movw %ax, %ds
    lgdtl 0x8000 + ap_gdt_pointer - ap_page
    movl %cr0, %eax
    orl $1, %eax
    movl %eax, %cr0
    ljmpl $CODE32, $ap_protected
.align 8
ap_gdt_pointer:
    .word gdt_end - gdt - 1
    .long gdt
ap_page_end:

.code32
ap_protected:
    movl $KERNEL_DATA, %eax
    movl %eax, %ds
    movl %eax, %es
    movl %eax, %ss
    movl $1, %edi
    lock xaddl %edi, next_cpu

to_long_mode:
    movl %cr4, %eax
    orl $0x620, %eax            # PAE, OSFXSR, OSXMMEXCPT
    movl %eax, %cr4
    movl $pml4, %eax
    movl %eax, %cr3
    movl $0xc0000080, %ecx      # EFER: long mode
    rdmsr
    orl $0x100, %eax
    wrmsr
    movl %cr0, %eax
    andl $0x9ffffff3, %eax      # caches on, no FPU emulation, no task switch
    orl $0x80000023, %eax       # paging, protection, MP, NE
    movl %eax, %cr0
    ljmpl $KERNEL_CODE, $long_mode

.code64
long_mode:
    movl $KERNEL_DATA, %eax
    movl %eax, %ds
    movl %eax, %es
    movl %eax, %ss
    xorl %eax, %eax
    movl %eax, %fs
    movl %eax, %gs
    lidt idt_pointer
    movl %edi, %eax             # this vCPU's task state: ring 3 fills it, but it must be loaded here
    shll $7, %eax
    leal tss_area(%rax), %ebx
    movl $64 * 128 + 8192, %ecx
    subl %eax, %ecx             # the limit, just past the port bitmap
    movl %edi, %edx
    shll $4, %edx
    movw %cx, gdt + 0x30(%rdx)
    movw %bx, gdt + 0x32(%rdx)
    shrl $16, %ebx
    movb %bl, gdt + 0x34(%rdx)
    movb $0x89, gdt + 0x35(%rdx)
    movb $0, gdt + 0x36(%rdx)
    movb %bh, gdt + 0x37(%rdx)
    addl $0x30, %edx
    ltr %dx
    leal 1(%rdi), %eax
    imulq $STACK_SIZE, %rax, %rax
    leaq stacks(%rax), %rax     # this vCPU's ring 3 stack
    movq %rax, %rsp
    subq $8, %rax               # as after a call
    pushq $USER_DATA
    pushq %rax
    pushq $0x2                  # interrupts stay off until the IDT is filled
    pushq $USER_CODE
    pushq $ring3
    iretq

# Services. Ring 3 calls `service_gate` with rax = which service, rdi, rsi, rdx = its arguments. The way into
# ring 0 is the invalid-opcode exception: `syscall` stays in ring 3 and `int` is refused where ring 3 is run
# natively by a KVM without hardware virtualisation.
.global service_gate
service_gate:
    ud2
    ret

invalid_opcode:
    cmpq $service_gate, (%rsp)
    je service
    pushq $0
    pushq $6
    jmp exception
service:
    addq $2, (%rsp)             # go on after the ud2
    cmpl $1, %eax
    je service_rdmsr
    cmpl $2, %eax
    je service_wrmsr
    cmpl $3, %eax
    je service_interrupts_on
    cmpl $4, %eax
    je service_triple_fault
    cmpl $5, %eax
    je service_emulation_failure
    cmpl $6, %eax
    je service_halt
    cmpl $7, %eax
    je service_ud2
# 0: sleep until an interrupt. rdi = this vCPU's interrupt counter, rsi = its value when the caller last
# looked, edx = count for the LAPIC timer. An interrupt since then means there is no reason to sleep; the
# look and the halt cannot be torn apart because interrupts are off until `sti` and one instruction after.
    cmpq %rsi, (%rdi)
    jne service_return
    movl $0xfee00380, %eax
    movl %edx, (%rax)
    sti
    hlt
    cli
service_return:
    iretq
service_rdmsr:                  # 1: edi = register; out: rax
    movl %edi, %ecx
    rdmsr
    shlq $32, %rdx
    orq %rdx, %rax
    iretq
service_wrmsr:                  # 2: edi = register, rsi = value
    movl %edi, %ecx
    movl %esi, %eax
    movq %rsi, %rdx
    shrq $32, %rdx
    wrmsr
    iretq
service_interrupts_on:          # 3
    orq $0x200, 16(%rsp)
    iretq
service_triple_fault:           # 4
    lidt no_idt_pointer
    ud2
service_emulation_failure:      # 5: where ring 0 is emulated, an instruction the emulator does not know
    clac
    iretq
service_halt:                   # 6
    cli
    hlt
    jmp service_halt
service_ud2:                    # 7
    ud2

# 256 entries of 16 bytes each. An exception (below 32) ends in `exception`, all else in `interrupt`.
.align 16
.global vectors
vectors:
.set vector, 0
.rept 256
    .align 16
    .if vector == 6
        jmp invalid_opcode
    .elseif vector < 32
        .if !(vector == 8 || (vector >= 10 && vector <= 14) || vector == 17 || vector == 21 || vector == 29 || vector == 30)
            pushq $0
        .endif
        pushq $vector
        jmp exception
    .else
        pushq $vector
        jmp interrupt
    .endif
    .set vector, vector + 1
.endr

# The interrupt stack is the upper half of an aligned page whose first word counts this vCPU's interrupts;
# the lower half is the stack of exceptions and services, which may halt and be interrupted.
.align 16
interrupt:
    pushq %rax
    pushq %rdx
    movq %rsp, %rax
    andq $-4096, %rax
    addq $1, (%rax)
    movq 16(%rsp), %rdx
    lock addq $1, vector_counts(,%rdx,8)
    movl $0xfee000b0, %eax      # end of interrupt
    movl $0, (%rax)
    popq %rdx
    popq %rax
    addq $8, %rsp
    iretq

# Leaves the facts in `fault` and continues in ring 3 at `on_exception`, which reports them.
exception:
    movq %rax, fault + 32
    popq %rax
    movq %rax, fault            # vector
    popq %rax
    movq %rax, fault + 8        # error code
    movq (%rsp), %rax
    movq %rax, fault + 16       # rip
    movq %cr2, %rax
    movq %rax, fault + 24
    movq 8(%rsp), %rax
    movq %rax, fault + 40       # cs
    movq $on_exception, (%rsp)
    movq $USER_CODE, 8(%rsp)
    movq $0x2, 16(%rsp)
    movq $exception_stack + 0x4000 - 8, 24(%rsp)
    movq $USER_DATA, 32(%rsp)
    iretq

.section .data
.align 4096
pml4:
    .quad pdpt + 7
    .fill 511, 8, 0
pdpt:
    .set i, 0
    .rept 4
        .quad low_directories + 4096 * i + 7
        .set i, i + 1
    .endr
    .set i, 0
    .rept 60
        .quad high_directories + 4096 * i + 7
        .set i, i + 1
    .endr
    .fill 448, 8, 0
low_directories:                # the first 4 GiB in user-accessible pages of 2 MiB; ring 3 fills the rest
    .set i, 0
    .rept 2048
        .quad i * 0x200000 + 0xe7
        .set i, i + 1
    .endr

.align 16
.global gdt
gdt:
    .quad 0
    .quad 0x00af9b000000ffff    # kernel code, 64 bit
    .quad 0x00cf93000000ffff    # kernel data
    .quad 0x00cf9b000000ffff    # kernel code, 32 bit
    .quad 0x00cff3000000ffff    # user data
    .quad 0x00affb000000ffff    # user code, 64 bit
    .fill 2 * 64, 8, 0          # task state of each vCPU
gdt_end:
gdt_pointer:
    .word gdt_end - gdt - 1
    .quad gdt
.align 8
idt_pointer:
    .word 256 * 16 - 1
    .quad idt
.align 8
no_idt_pointer:
    .word 0
    .quad 0
.align 8
.global start_info
start_info:
    .quad 0
next_cpu:
    .long 1

.section .bss
.align 4096
.global high_directories
high_directories:               # 4 GiB to 64 GiB
    .skip 60 * 4096
.global interrupt_stacks
interrupt_stacks:
    .skip 64 * 4096
stacks:
    .skip 64 * STACK_SIZE
exception_stack:
    .skip 0x4000
.global tss_area
tss_area:                       # 64 task states of 128 bytes, then one port bitmap of zeroes for all of them
    .skip 64 * 128 + 8192 + 64
.align 16
.global idt
idt:
    .skip 256 * 16
.global vector_counts
vector_counts:
    .skip 256 * 8
.global fault
fault:
    .skip 64
