/**
 * Writes an EROFS file system, which Linux mounts read-only (the kernel's Documentation/filesystems/erofs.rst and fs/erofs/erofs_fs.h): a guest
 * reads of it what it needs, where an initramfs is copied whole. Files lie first, then folders, then the table of inodes. Left out:
 * compression, data inside of inodes, extended attributes, owners other than root, hard links, checksums.
 */
import { type FileHandle, open } from 'node:fs/promises';
import { basename } from 'node:path';
import { type Archive, parentOf } from './archive.ts';

const BLOCK = 4096;
/** struct erofs_super_block at byte 1024. Fields that are not named are zero. */
const Super = { at: 1024, magic: 0, blockBits: 12, rootNid: 14, inodes: 16, blocks: 36, inodeTable: 40 } as const;
const MAGIC = 0xe0f5e1e2;
/** struct erofs_inode_compact; its format 0: no extension, data in blocks of its own. An inode's number is its place in the table. */
const Inode = { bytes: 32, mode: 4, links: 6, size: 8, block: 16, number: 20 } as const;
/** struct erofs_dirent; the names follow the last entry of a block. */
const Entry = { bytes: 12, nid: 0, nameAt: 8, type: 10 } as const;
const FileType = { file: 1, folder: 2, link: 7 } as const;
const Mode = { [FileType.file]: 0o100000, [FileType.folder]: 0o040000, [FileType.link]: 0o120000 } as const;
/** 0 stands for no inode. */
const ROOT = 1;

interface Node {
  readonly nid: number;
  readonly type: (typeof FileType)[keyof typeof FileType];
  readonly mode: number;
  /** Of a folder. */
  readonly children: Map<string, Node>;
  readonly parent: Node | undefined;
  block: number;
  size: number;
}

export class ErofsWriter implements Archive {
  readonly #out: FileHandle;
  readonly #nodes: Node[] = [];
  readonly #paths = new Map<string, Node>();
  /** The first one that is free. Block 0 is the superblock's. */
  #block = 1;

  private constructor(out: FileHandle) {
    this.#out = out;
    this.#paths.set('', this.#node(FileType.folder, 0o755, undefined));
  }

  static async create(path: string): Promise<ErofsWriter> {
    return new ErofsWriter(await open(path, 'w'));
  }

  async folder(path: string): Promise<void> {
    this.#folder(path);
  }

  async file(path: string, content: string | Uint8Array, mode = 0o644): Promise<void> {
    await this.#write(this.#add(path, FileType.file, mode), Buffer.from(content));
  }

  async copy(path: string, source: string, mode?: number): Promise<void> {
    const from = await open(source, 'r');
    try {
      const { size, mode: own } = await from.stat();
      const node = this.#add(path, FileType.file, mode ?? own & 0o777);
      if (node === undefined) return;
      node.block = this.#block;
      for await (const chunk of from.createReadStream({ highWaterMark: 1 << 20, autoClose: false })) {
        await this.#out.write(chunk, 0, chunk.length, node.block * BLOCK + node.size);
        node.size += chunk.length;
      }
      if (node.size !== size) throw new Error(`${source} changed while it was read`);
      this.#block += Math.ceil(size / BLOCK);
    } finally {
      await from.close();
    }
  }

  async link(path: string, target: string): Promise<void> {
    await this.#write(this.#add(path, FileType.link, 0o777), Buffer.from(target));
  }

  async end(): Promise<void> {
    for (const node of this.#nodes) if (node.type === FileType.folder) await this.#write(node, entries(node));
    const table = Buffer.alloc((ROOT + this.#nodes.length) * Inode.bytes);
    for (const node of this.#nodes) writeInode(table.subarray(node.nid * Inode.bytes), node);
    const inodeTable = this.#block;
    await this.#write({ block: 0, size: 0 }, table);
    const first = Buffer.alloc(BLOCK);
    const fields = first.subarray(Super.at);
    fields.writeUInt32LE(MAGIC, Super.magic);
    fields[Super.blockBits] = Math.log2(BLOCK);
    fields.writeUInt16LE(ROOT, Super.rootNid);
    fields.writeUInt32LE(this.#nodes.length, Super.inodes);
    fields.writeUInt32LE(this.#block, Super.blocks);
    fields.writeUInt32LE(inodeTable, Super.inodeTable);
    await this.#out.write(first, 0, BLOCK, 0);
    await this.#out.truncate(this.#block * BLOCK);
    await this.#out.close();
  }

  #folder(path: string): Node {
    const there = this.#paths.get(path);
    if (there !== undefined) return there;
    const parent = this.#folder(parentOf(path));
    const node = this.#node(FileType.folder, 0o755, parent);
    this.#name(path, node, parent);
    return node;
  }

  /** Undefined when `path` was added already. */
  #add(path: string, type: Node['type'], mode: number): Node | undefined {
    if (this.#paths.has(path)) return undefined;
    const parent = this.#folder(parentOf(path));
    const node = this.#node(type, mode, parent);
    this.#name(path, node, parent);
    return node;
  }

  #node(type: Node['type'], mode: number, parent: Node | undefined): Node {
    const node: Node = { nid: ROOT + this.#nodes.length, type, mode, parent, children: new Map(), block: 0, size: 0 };
    this.#nodes.push(node);
    return node;
  }

  #name(path: string, node: Node, parent: Node): void {
    if (parent.type !== FileType.folder) throw new Error(`${parentOf(path)} is no folder`);
    parent.children.set(basename(path), node);
    this.#paths.set(path, node);
  }

  /** Writes the content of a node to the next free blocks. */
  async #write(node: Pick<Node, 'block' | 'size'> | undefined, content: Buffer): Promise<void> {
    if (node === undefined) return;
    node.block = this.#block;
    node.size = content.length;
    await this.#out.write(content, 0, content.length, node.block * BLOCK);
    this.#block += Math.ceil(content.length / BLOCK);
  }
}

function writeInode(inode: Buffer, { nid, type, mode, size, block, children }: Node): void {
  const folders = [...children.values()].filter((child) => child.type === FileType.folder).length;
  inode.writeUInt16LE(Mode[type] | mode, Inode.mode);
  inode.writeUInt16LE(type === FileType.folder ? 2 + folders : 1, Inode.links);
  inode.writeUInt32LE(size, Inode.size);
  inode.writeUInt32LE(block, Inode.block);
  inode.writeUInt32LE(nid, Inode.number);
}

/** A folder's content: entries in the order of their names' bytes, in blocks, each with as many entries and their names as it holds. */
function entries(folder: Node): Buffer {
  const named = new Map([['.', folder], ['..', folder.parent ?? folder], ...folder.children]);
  const list = [...named].map(([name, node]) => ({ name: Buffer.from(name), node }));
  list.sort((a, b) => Buffer.compare(a.name, b.name));
  const blocks: (typeof list)[] = [];
  let room = 0;
  for (const item of list) {
    const needed = Entry.bytes + item.name.length;
    if (needed > room) {
      blocks.push([]);
      room = BLOCK;
    }
    blocks.at(-1)?.push(item);
    room -= needed;
  }
  return Buffer.concat(blocks.map((items, i) => block(items, i === blocks.length - 1)));
}

function block(items: readonly { readonly name: Buffer; readonly node: Node }[], last: boolean): Buffer {
  const bytes = Buffer.alloc(BLOCK);
  let nameAt = items.length * Entry.bytes;
  for (const [i, { name, node }] of items.entries()) {
    const entry = bytes.subarray(i * Entry.bytes);
    entry.writeUInt32LE(node.nid, Entry.nid);
    entry.writeUInt16LE(nameAt, Entry.nameAt);
    entry[Entry.type] = node.type;
    name.copy(bytes, nameAt);
    nameAt += name.length;
  }
  return last ? bytes.subarray(0, nameAt) : bytes;
}
