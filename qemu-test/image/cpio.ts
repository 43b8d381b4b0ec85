/**
 * Writes a cpio archive in the "newc" format, which the Linux kernel unpacks as initramfs (the kernel's
 * Documentation/driver-api/early-userspace/buffer-format.rst). Several archives in one file are unpacked one after
 * the other, so a part that never changes can be made once. Left out: hard links, checksums.
 */
import { createReadStream, type WriteStream } from 'node:fs';
import { stat } from 'node:fs/promises';
import { type Archive, parentOf } from './archive.ts';

const MAGIC = '070701';
const TRAILER = 'TRAILER!!!';
const FileType = { directory: 0o040000, file: 0o100000, symlink: 0o120000 } as const;
const ALIGNMENT = 4;

export class CpioWriter implements Archive {
  readonly #out: WriteStream;
  readonly #known = new Set<string>();
  #inode = 1;

  constructor(out: WriteStream) {
    this.#out = out;
  }

  async folder(path: string): Promise<void> {
    if (path === '' || path === '.' || this.#known.has(path)) return;
    await this.folder(parentOf(path));
    this.#known.add(path);
    await this.#write(header(path, FileType.directory | 0o755, 0, this.#inode++));
  }

  async file(path: string, content: string | Uint8Array, mode = 0o644): Promise<void> {
    if (!(await this.#claim(path))) return;
    const bytes = typeof content === 'string' ? Buffer.from(content) : content;
    await this.#write(header(path, FileType.file | mode, bytes.length, this.#inode++));
    await this.#write(padded(bytes));
  }

  async copy(path: string, source: string, mode?: number): Promise<void> {
    if (!(await this.#claim(path))) return;
    const { size, mode: own } = await stat(source);
    await this.#write(header(path, FileType.file | (mode ?? own & 0o777), size, this.#inode++));
    let sent = 0;
    for await (const chunk of createReadStream(source, { highWaterMark: 1 << 20 })) {
      sent += chunk.length;
      await this.#write(chunk);
    }
    if (sent !== size) throw new Error(`${source} changed while it was read`);
    await this.#write(Buffer.alloc(-size & (ALIGNMENT - 1)));
  }

  async link(path: string, target: string): Promise<void> {
    if (!(await this.#claim(path))) return;
    const bytes = Buffer.from(target);
    await this.#write(header(path, FileType.symlink | 0o777, bytes.length, this.#inode++));
    await this.#write(padded(bytes));
  }

  async end(): Promise<void> {
    await this.#write(header(TRAILER, 0, 0, 0));
    await new Promise<void>((resolve, reject) => {
      this.#out.once('error', reject);
      this.#out.end(resolve);
    });
  }

  /** False when `path` was written already: the first one counts. */
  async #claim(path: string): Promise<boolean> {
    if (this.#known.has(path)) return false;
    await this.folder(parentOf(path));
    this.#known.add(path);
    return true;
  }

  #write(bytes: Uint8Array): Promise<void> {
    return new Promise((resolve, reject) => {
      this.#out.write(bytes, (error) => (error ? reject(error) : resolve()));
    });
  }
}

/** The 110-byte header, thirteen hexadecimal numbers after the magic, then the name; both padded to 4 bytes. */
function header(name: string, mode: number, size: number, inode: number): Uint8Array {
  const nameSize = Buffer.byteLength(name) + 1;
  const fields = [inode, mode, 0, 0, 1, 0, size, 0, 0, 0, 0, nameSize, 0];
  const text = MAGIC + fields.map((n) => n.toString(16).padStart(8, '0')).join('');
  return padded(Buffer.from(`${text}${name}\0`));
}

function padded(bytes: Uint8Array): Uint8Array {
  const rest = -bytes.length & (ALIGNMENT - 1);
  return rest === 0 ? bytes : Buffer.concat([bytes, Buffer.alloc(rest)]);
}
