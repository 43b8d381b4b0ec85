/** Sockets that belong together (`sockets.ts`): watched by an epoll set, read and written through one buffer, closed at once. */
import { constants as os } from 'node:os';
import { accept, close, listen, readNow, systemError, writeNow } from '../../src/sys/libc.ts';
import { type MappedMemory, mapAnonymous } from '../../src/sys/memory.ts';
import { inNamespace } from '../guest/network-namespace.ts';
import type { Epoll } from './epoll.ts';
import { connectSocket, type Endpoint, openSocket, type SocketKind } from './sockets.ts';

/** Bytes that `read` and `write` move at most. */
const BUFFER = 64 * 1024;

export class SocketSet {
  readonly #epoll: Epoll;
  readonly #onError: (error: Error) => void;
  readonly #memory = buffer();
  readonly #open = new Set<number>();

  /** `onError`: what a handler has thrown, after which its socket is not watched any more. */
  constructor(epoll: Epoll, onError: (error: Error) => void) {
    this.#epoll = epoll;
    this.#onError = onError;
  }

  /** A socket in network namespace `namespace`, bound to `local` and connected to `remote`; of TCP that has only begun. */
  connect(kind: SocketKind, namespace: string | null, local: Endpoint, remote: Endpoint): number {
    const fd = this.#add(inNamespace(namespace, () => openSocket(kind, local)));
    connectSocket(fd, remote);
    return fd;
  }

  listen(namespace: string | null, local: Endpoint): number {
    const fd = this.#add(inNamespace(namespace, () => openSocket('tcp', local)));
    listen(fd, 1);
    return fd;
  }

  /** The socket of a connection that was made to `listener`; negative when there is none. */
  accept(listener: number): number {
    const fd = accept(listener);
    return fd < 0 ? fd : this.#add(fd);
  }

  watch(fd: number, events: number, handler: (events: number) => void): void {
    this.#epoll.watch(fd, events, (ready) => {
      try {
        handler(ready);
      } catch (error) {
        this.#epoll.forget(fd);
        this.#onError(error instanceof Error ? error : new Error(String(error)));
      }
    });
  }

  change(fd: number, events: number): void {
    this.#epoll.change(fd, events);
  }

  /** What has come: a view that the next call overwrites, empty at the end of a stream; undefined when nothing has. */
  read(fd: number): Uint8Array | undefined {
    const length = readNow(fd, this.#memory.address, BUFFER);
    if (length >= 0) return this.#memory.u8.subarray(0, length);
    if (length === -os.errno.EAGAIN) return undefined;
    throw systemError('read', -length);
  }

  /** Sends `data`, or as much as there is room for; returns how many bytes. */
  write(fd: number, data: Uint8Array): number {
    const part = data.subarray(0, BUFFER);
    if (part.byteOffset !== this.#memory.u8.byteOffset || part.buffer !== this.#memory.u8.buffer)
      this.#memory.u8.set(part);
    const length = writeNow(fd, this.#memory.address, part.length);
    if (length >= 0) return length;
    if (length === -os.errno.EAGAIN) return 0;
    throw systemError('write', -length);
  }

  close(fd: number): void {
    if (!this.#open.delete(fd)) return;
    this.#epoll.forget(fd);
    close(fd);
  }

  closeAll(): void {
    for (const fd of this.#open) this.close(fd);
  }

  #add(fd: number): number {
    this.#open.add(fd);
    return fd;
  }
}

let memory: MappedMemory | undefined;

/** One for all, because nothing stays in it. */
function buffer(): MappedMemory {
  memory ??= mapAnonymous(BUFFER);
  return memory;
}
