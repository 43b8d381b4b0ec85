import { existsSync, mkdtempSync, readdirSync, rmSync, statSync, writeFileSync } from 'node:fs';
import { constants as os, tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterEach, beforeEach, describe, expect, it, vi } from 'vitest';
import * as libc from '../../../src/sys/libc.ts';
import { UnixListener, UnixSocket } from '../../../src/sys/unix-socket.ts';

const soon = () => performance.now() + 1000;
const openDescriptors = () => readdirSync('/proc/self/fd').length;

export function unixSocketSuite(): void {
  describe('UnixSocket', () => {
    let near: UnixSocket;
    let far: UnixSocket;
    beforeEach(() => {
      [near, far] = UnixSocket.pair();
    });
    afterEach(() => {
      near.close();
      far.close();
    });

    it('moves exact byte counts, however they were cut', () => {
      const bytes = Uint8Array.from({ length: 100 }, (_, i) => i);
      near.send(bytes.subarray(0, 30), soon());
      near.send(bytes.subarray(30), soon());
      const target = new Uint8Array(102);
      far.receive(target, 1, 60, soon());
      far.receive(target, 61, 40, soon());
      expect(target.subarray(1, 101)).toEqual(bytes);
      expect([target[0], target[101]]).toEqual([0, 0]);
    });

    it('moves more than a socket buffer holds when the other side reads', () => {
      const bytes = new Uint8Array(150_000).map((_, i) => i * 7);
      const target = new Uint8Array(bytes.length);
      let sent = 0;
      let received = 0;
      while (received < bytes.length) {
        const out = sent < bytes.length ? near.trySend(bytes, sent) : -1;
        if (out > 0) sent += out;
        const count = far.tryReceive(target, received, bytes.length - received);
        if (count > 0) received += count;
      }
      expect(target).toEqual(bytes);
    });

    it('passes descriptors in both directions, close-on-exec, and they name the same file', () => {
      const fds = [libc.memfdCreate('a'), libc.memfdCreate('b'), libc.memfdCreate('c')];
      for (const [from, to] of [
        [near, far],
        [far, near],
      ]) {
        from.send(new Uint8Array([1, 2, 3]), soon(), fds);
        const received: number[] = [];
        to.receive(new Uint8Array(3), 0, 3, soon(), received, 3);
        expect(received).toHaveLength(3);
        received.forEach((fd, i) => {
          expect(libc.fstat(fd)).toEqual(libc.fstat(fds[i]));
          expect(libc.fcntl(fd, libc.FcntlCommand.getDescriptorFlags)).toBe(1);
          libc.close(fd);
        });
      }
      for (const fd of fds) libc.close(fd);
    });

    it('passes as many descriptors as the kernel allows', () => {
      const fd = libc.memfdCreate('many');
      near.send(new Uint8Array(1), soon(), new Array(253).fill(fd));
      const received: number[] = [];
      far.receive(new Uint8Array(1), 0, 1, soon(), received, 253);
      expect(new Set(received).size).toBe(253);
      for (const copy of received) libc.close(copy);
      expect(() => near.send(new Uint8Array(1), soon(), new Array(254).fill(fd))).toThrow(
        expect.objectContaining({ code: 'EINVAL' }),
      );
      libc.close(fd);
    });

    it('closes descriptors that are more than wanted, and says so', () => {
      const fd = libc.memfdCreate('unwanted');
      const before = openDescriptors();
      near.send(new Uint8Array(4), soon(), [fd, fd, fd]);
      const received: number[] = [];
      expect(() => far.receive(new Uint8Array(4), 0, 4, soon(), received, 2)).toThrow(
        expect.objectContaining({ code: 'EMSGSIZE' }),
      );
      expect(received).toEqual([]);
      near.send(new Uint8Array(4), soon(), [fd]);
      expect(() => far.receive(new Uint8Array(4), 0, 4, soon())).toThrow(expect.objectContaining({ code: 'EMSGSIZE' }));
      expect(openDescriptors()).toBe(before);
      libc.close(fd);
    });

    it('counts the limit over all parts of a message', () => {
      const fd = libc.memfdCreate('parts');
      const before = openDescriptors();
      near.send(new Uint8Array(2), soon(), [fd, fd]);
      near.send(new Uint8Array(2), soon(), [fd, fd]);
      const received: number[] = [];
      expect(() => far.receive(new Uint8Array(4), 0, 4, soon(), received, 3)).toThrow(
        expect.objectContaining({ code: 'EMSGSIZE' }),
      );
      expect(received).toHaveLength(2);
      for (const copy of received) libc.close(copy);
      expect(openDescriptors()).toBe(before);
      libc.close(fd);
    });

    it('gives up at the deadline, sending or receiving', () => {
      const start = performance.now();
      expect(() => far.receive(new Uint8Array(1), 0, 1, start + 40)).toThrow(
        expect.objectContaining({ code: 'ETIMEDOUT' }),
      );
      expect(performance.now() - start).toBeGreaterThanOrEqual(39);
      expect(() => near.send(new Uint8Array(10_000_000), performance.now() + 40)).toThrow(
        expect.objectContaining({ code: 'ETIMEDOUT' }),
      );
      // However busy the machine is: without a deadline it would be for ever.
      expect(performance.now() - start).toBeLessThan(30_000);
    });

    it('reports the end of the stream: 0 when asked for some, ECONNRESET when it breaks off', () => {
      near.send(new Uint8Array([1, 2]), soon());
      near.close();
      const target = new Uint8Array(4);
      expect(() => far.receive(target, 0, 4, soon())).toThrow(expect.objectContaining({ code: 'ECONNRESET' }));
      expect([...target]).toEqual([1, 2, 0, 0]);
      expect(far.tryReceive(target, 0, 1)).toBe(0);
    });

    it('throws EPIPE instead of a signal when the other side is gone', () => {
      far.close();
      expect(() => near.send(new Uint8Array(1), soon())).toThrow(expect.objectContaining({ code: 'EPIPE' }));
    });

    it('never waits in trySend and tryReceive', () => {
      expect(far.tryReceive(new Uint8Array(1), 0, 1)).toBe(-1);
      const chunk = new Uint8Array(65536);
      let sent = 0;
      while (near.trySend(chunk, 0) > 0) sent++;
      expect(sent).toBeGreaterThan(0);
      expect(near.trySend(chunk, 0)).toBe(-1);
    });

    it.each([
      [-1, 1],
      [0, 0],
      [0, 5],
      [4, 1],
    ])('refuses to receive outside of the target: start %d, length %d of 4', (start, length) => {
      near.send(new Uint8Array(8), soon());
      expect(() => far.tryReceive(new Uint8Array(4), start, length)).toThrow(RangeError);
    });

    it('is EBADF once it is closed, and closing it twice does not close somebody else’s descriptor', () => {
      near.close();
      const reused = libc.memfdCreate('reused');
      near.close();
      expect(libc.fstat(reused).size).toBe(0);
      expect(() => near.send(new Uint8Array(1), soon())).toThrow(expect.objectContaining({ code: 'EBADF' }));
      expect(() => near.tryReceive(new Uint8Array(1), 0, 1)).toThrow(expect.objectContaining({ code: 'EBADF' }));
      libc.close(reused);
    });
  });

  describe('UnixListener', () => {
    let directory: string;
    let path: string;
    beforeEach(() => {
      directory = mkdtempSync(join(tmpdir(), 'listener-'));
      path = join(directory, 'socket');
    });
    afterEach(() => rmSync(directory, { recursive: true }));

    it('makes a socket that only its owner can use, whatever the umask', () => {
      const umask = process.umask(0);
      const listener = UnixListener.listen(path);
      process.umask(umask);
      expect(statSync(path).mode & 0o777).toBe(0o600);
      listener.close();
      expect(existsSync(path)).toBe(false);
      listener.close();
    });

    it('accepts connections, or nothing when there are none', () => {
      const listener = UnixListener.listen(path);
      expect(listener.accept()).toBeNull();
      const start = performance.now();
      expect(listener.accept(start + 30)).toBeNull();
      expect(performance.now() - start).toBeGreaterThanOrEqual(29);
      const client = UnixSocket.connect(path, soon());
      const server = listener.accept(soon());
      if (server === null) throw new Error('no connection');
      client.send(new Uint8Array([42]), soon());
      const target = new Uint8Array(1);
      server.receive(target, 0, 1, soon());
      expect(target[0]).toBe(42);
      client.close();
      server.close();
      listener.close();
      expect(() => listener.accept()).toThrow(expect.objectContaining({ code: 'EBADF' }));
    });

    it('gives each connection from the event loop, also one for which there was no descriptor at first', async () => {
      const listener = UnixListener.listen(path);
      const first = UnixSocket.connect(path, soon());
      const accepted: UnixSocket[] = [];
      const given = (count: number) => vi.waitFor(() => expect(accepted).toHaveLength(count), 10_000);
      let asked = 0;
      const accept = listener.accept.bind(listener);
      listener.accept = () => {
        if (++asked <= 2) throw libc.systemError('accept4', os.errno.EMFILE);
        return accept();
      };
      const watch = listener.watch((socket) => accepted.push(socket));
      await given(1);
      expect(asked).toBe(3);
      const second = UnixSocket.connect(path, soon());
      await given(2);
      watch.close();
      for (const socket of [first, second, ...accepted]) socket.close();
      listener.close();
    });

    it('replaces a socket that nobody listens on, but no live one and no file', () => {
      const dead = libc.unixSocket();
      libc.bindUnix(dead, path, 0o600);
      libc.close(dead);
      const listener = UnixListener.listen(path);
      expect(() => UnixListener.listen(path)).toThrow(expect.objectContaining({ code: 'EADDRINUSE' }));
      const file = join(directory, 'file');
      writeFileSync(file, 'precious');
      expect(() => UnixListener.listen(file)).toThrow(expect.objectContaining({ code: 'EADDRINUSE' }));
      expect(statSync(file).size).toBe(8);
      listener.close();
    });

    it('leaves a path alone that has become somebody else’s', () => {
      const listener = UnixListener.listen(path);
      rmSync(path);
      writeFileSync(path, 'new');
      listener.close();
      expect(existsSync(path)).toBe(true);
    });

    it.each([
      ['ENOENT', 'missing'],
      ['ECONNREFUSED', 'file'],
      ['ENAMETOOLONG', 'x'.repeat(200)],
    ])('connect throws %s', (code, name) => {
      writeFileSync(join(directory, 'file'), '');
      const before = openDescriptors();
      expect(() => UnixSocket.connect(join(directory, name), soon())).toThrow(expect.objectContaining({ code }));
      expect(openDescriptors()).toBe(before);
    });

    it('says how long a path may be, and takes one that is as long', () => {
      const fitting = join(directory, 'x'.repeat(107 - directory.length - 1));
      UnixListener.listen(fitting).close();
      const problem = {
        code: 'ENAMETOOLONG',
        message: expect.stringContaining('has 108 bytes, 107 are the most'),
        hint: expect.stringContaining('shorter'),
      };
      expect(() => UnixListener.listen(`${fitting}x`)).toThrow(expect.objectContaining(problem));
      expect(() => UnixSocket.connect(`${fitting}x`, soon())).toThrow(expect.objectContaining(problem));
    });

    it('connect gives up when the backlog stays full', () => {
      const listener = UnixListener.listen(path, { backlog: 0 });
      const clients: UnixSocket[] = [];
      expect(() => {
        for (let i = 0; i < 10; i++) clients.push(UnixSocket.connect(path, performance.now() + 30));
      }).toThrow(expect.objectContaining({ code: 'ETIMEDOUT' }));
      for (const client of clients) client.close();
      listener.close();
    });
  });
}
