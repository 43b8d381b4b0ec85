/**
 * An apt of our own: it uses the system's mirror, keys and proxy, and keeps every bit of state (lists, locks, archives,
 * the empty list of installed packages) in one folder. Nothing of the system's apt or dpkg changes, and an ordinary
 * user may run it. See apt.conf(5).
 */
import { mkdir, readdir, writeFile } from 'node:fs/promises';
import { userInfo } from 'node:os';
import { join } from 'node:path';
import { run } from '../host/process.ts';
import type { PackageSource } from './sources.ts';

export interface AptEntry {
  readonly source: PackageSource;
  readonly suite: string;
}

export interface AptOptions {
  readonly signal?: AbortSignal | undefined;
  /** Called with a few words on how far a download is. */
  readonly onProgress?: ((state: string) => void) | undefined;
}

/** Settings that decide how the mirror is reached and how old it may be; nothing else of the system's is taken over. */
const CONNECTION_SETTING =
  /^Acquire::(?:(?:https?|ftp)::(?:[^ ]*::)?(?:Proxy|CaInfo|Timeout|Verify-Peer|Pipeline-Depth)[^ ]*|Check-Valid-Until|Check-Date) /i;

export class PrivateApt {
  readonly #directory: string;
  readonly #options: AptOptions;

  private constructor(directory: string, options: AptOptions) {
    this.#directory = directory;
    this.#options = options;
  }

  /** Sets the folder up with `entries` as its only sources, and reads their package lists. */
  static async open(directory: string, entries: readonly AptEntry[], options: AptOptions = {}): Promise<PrivateApt> {
    const apt = new PrivateApt(directory, options);
    for (const folder of ['lists/partial', 'cache/archives/partial', 'etc/preferences.d', 'etc/keys', 'download']) {
      await mkdir(join(directory, folder), { recursive: true });
    }
    await writeFile(join(directory, 'status'), '');
    await writeFile(join(directory, 'etc/sources.list'), `${(await apt.#lines(entries)).join('\n')}\n`);
    await writeFile(apt.#configuration, `${apt.#settings(await connectionSettings()).join('\n')}\n`);
    options.onProgress?.('reading package lists');
    await apt.#apt('apt-get', ['-qq', 'update']);
    return apt;
  }

  /** The one package that `name`, an empty package, depends on first: `linux-image-cloud-amd64` names a version so. */
  async dependency(name: string): Promise<string> {
    const text = await this.#apt('apt-cache', ['depends', '--important', name]);
    const found = /^\s*\|?Depends: ([a-z0-9][a-z0-9.+-]*)$/m.exec(text)?.[1];
    if (found === undefined) throw new Error(`package ${name} depends on nothing`);
    return found;
  }

  /** Downloads `packages`, with everything they need when `closure` is set; returns the archive files. */
  async download(packages: readonly string[], closure: boolean, suite: string): Promise<string[]> {
    const folder = join(this.#directory, closure ? 'cache/archives' : 'download');
    if (closure) {
      await this.#apt('apt-get', ['-y', '-q', '-t', suite, '--download-only', 'install', ...packages]);
    } else {
      await this.#apt('apt-get', ['-q', '-t', suite, 'download', ...packages], folder);
    }
    return (await readdir(folder)).filter((name) => name.endsWith('.deb')).map((name) => join(folder, name));
  }

  get #configuration(): string {
    return join(this.#directory, 'apt.conf');
  }

  async #apt(command: string, args: readonly string[], cwd = this.#directory): Promise<string> {
    const { onProgress, signal } = this.#options;
    return run(command, onProgress === undefined ? args : ['-o', 'APT::Status-Fd=3', ...args], {
      cwd,
      signal,
      env: { APT_CONFIG: this.#configuration, LC_ALL: 'C', DEBIAN_FRONTEND: 'noninteractive' },
      ...(onProgress === undefined ? {} : { onStatus: (line) => reportStatus(line, onProgress) }),
    });
  }

  async #lines(entries: readonly AptEntry[]): Promise<string[]> {
    const lines: string[] = [];
    for (const [i, { source, suite }] of entries.entries()) {
      let option = '';
      if (source.signedBy !== undefined) {
        let keyring = source.signedBy;
        if (keyring.includes('-----BEGIN')) {
          keyring = join(this.#directory, 'etc/keys', `${i}.asc`);
          await writeFile(keyring, armoured(source.signedBy));
        }
        option = `[signed-by=${keyring}] `;
      }
      lines.push(`deb ${option}${source.uri} ${suite} main`);
    }
    return lines;
  }

  #settings(connection: readonly string[]): string[] {
    const at = (path: string) => JSON.stringify(join(this.#directory, path));
    return [
      `Dir::Etc ${at('etc')};`,
      `Dir::Etc::sourcelist ${at('etc/sources.list')};`,
      'Dir::Etc::sourceparts "-";',
      'Dir::Etc::parts "-";',
      'Dir::Etc::main "-";',
      // The keys for sources that name none.
      'Dir::Etc::trusted "/etc/apt/trusted.gpg";',
      'Dir::Etc::trustedparts "/etc/apt/trusted.gpg.d";',
      `Dir::State ${at('.')};`,
      `Dir::State::lists ${at('lists')};`,
      `Dir::State::status ${at('status')};`,
      `Dir::Cache ${at('cache')};`,
      `Dir::Log ${at('.')};`,
      'APT::Architecture "amd64";',
      'APT::Architectures "amd64";',
      'APT::Install-Recommends "false";',
      'Acquire::Languages "none";',
      'Acquire::Retries "3";',
      `APT::Sandbox::User ${JSON.stringify(userInfo().username)};`,
      ...connection,
    ];
  }
}

/** `dlstatus:1:42.5:Retrieving file 3 of 9 (2s remaining)`. */
function reportStatus(line: string, onProgress: (state: string) => void): void {
  const match = /^dlstatus:[^:]*:([\d.]+):(?:Retrieving file (\d+ of \d+))?/.exec(line);
  if (match !== null) onProgress(`${Math.floor(Number(match[1]))} %${match[2] === undefined ? '' : ` (${match[2]})`}`);
}

/** The system's proxy and TLS settings, as configuration lines. */
async function connectionSettings(): Promise<string[]> {
  const dump = await run('apt-config', ['dump']);
  return dump.split('\n').filter((line) => CONNECTION_SETTING.test(line));
}

/** An inline key of a deb822 source: each line indented by a space, an empty one written as a dot. */
function armoured(text: string): string {
  const lines = text.split('\n').map((line) => line.trim());
  return `${lines.map((line) => (line === '.' ? '' : line)).join('\n')}\n`;
}
