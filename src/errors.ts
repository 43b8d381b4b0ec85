/**
 * The error classes of the package. Each has a stable `code`; a `hint` where the user can do something about it.
 * No message or property ever holds key material.
 */
export class VipsecError extends Error {
  /** Stable, upper-case identifier, such as `FEATURES_MISSING`. */
  readonly code: string;
  /** What the user can do, one sentence. */
  readonly hint: string | undefined;

  constructor(code: string, message: string, options?: { hint?: string; cause?: unknown }) {
    super(message, options?.cause === undefined ? undefined : { cause: options.cause });
    this.name = new.target.name;
    this.code = code;
    this.hint = options?.hint;
  }
}

/** A system call failed. `code` is the name of the errno (`EACCES`), `syscall` the call. */
export class SystemError extends VipsecError {
  readonly errno: number;
  readonly syscall: string;

  constructor(syscall: string, errno: number, code: string, detail: string, options?: { hint?: string }) {
    super(code, `${syscall}: ${detail}`, options);
    this.syscall = syscall;
    this.errno = errno;
  }
}

/** Reaching the PCI function failed: the vfio-user session, kernel VFIO, DMA mapping, PCI configuration space. */
export class VfioError extends VipsecError {}

/** The device broke the virtio standard, or lacks what the driver requires; or a virtqueue was closed because of it. */
export class VirtioError extends VipsecError {}

/** The device answered an administration command with a status other than OK (Virtio 1.4, 2.12.1). */
export class AdminCommandError extends VipsecError {
  readonly opcode: number;
  readonly status: number;
  readonly qualifier: number;

  constructor(
    code: string,
    message: string,
    reply: { opcode: number; status: number; qualifier: number },
    options?: { hint?: string },
  ) {
    super(code, message, options);
    this.opcode = reply.opcode;
    this.status = reply.status;
    this.qualifier = reply.qualifier;
  }
}

/** An SA, policy or IPsec operation is invalid or refused. `path` names the field (`sas[0].aead.key`) when one is to blame. */
export class IpsecError extends VipsecError {
  readonly path: string | undefined;

  constructor(code: string, message: string, options?: { hint?: string; cause?: unknown; path?: string }) {
    super(code, message, options);
    this.path = options?.path;
  }
}

/** A file or an argument that the user gave is invalid (exit code 2 of `vipsec`). */
export class InputError extends VipsecError {}
