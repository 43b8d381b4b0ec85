import { describe, expect, it } from 'vitest';
import { parseDeb822, parseOneLine, sourceOf } from '../../qemu-test/fetch/sources.ts';

const KEYRING = '/usr/share/keyrings/debian-archive-keyring.gpg';

describe('one-line sources', () => {
  it('reads URI, suite, components and the keyring, and passes over comments and source packages', () => {
    const text = [
      '# deb http://old.example/debian bookworm main',
      `deb [arch=amd64 signed-by=${KEYRING}] http://mirror.example/debian bookworm main contrib # a mirror`,
      'deb-src http://mirror.example/debian bookworm main',
      '  deb\thttp://security.example/debian-security bookworm-security main',
      '',
    ].join('\n');
    expect(parseOneLine(text)).toEqual([
      { uri: 'http://mirror.example/debian', suites: ['bookworm'], components: ['main', 'contrib'], signedBy: KEYRING },
      { uri: 'http://security.example/debian-security', suites: ['bookworm-security'], components: ['main'] },
    ]);
  });
});

describe('deb822 sources', () => {
  it('reads each stanza, with several suites and URIs', () => {
    const text = [
      'Types: deb deb-src',
      '# a comment in between',
      'URIs: http://a.example/debian http://b.example/debian',
      'Suites: bookworm bookworm-updates',
      'Components: main',
      `Signed-By: ${KEYRING}`,
      '',
      'Types: deb-src',
      'URIs: http://a.example/debian',
      'Suites: bookworm',
      'Components: main',
    ].join('\n');
    const found = parseDeb822(text);
    expect(found.map(({ uri }) => uri)).toEqual(['http://a.example/debian', 'http://b.example/debian']);
    expect(found[0]).toMatchObject({
      suites: ['bookworm', 'bookworm-updates'],
      components: ['main'],
      signedBy: KEYRING,
    });
  });

  it('leaves out a stanza that is disabled', () => {
    const stanza = (enabled: string) =>
      `Enabled: ${enabled}\nTypes: deb\nURIs: http://a.example\nSuites: x\nComponents: main`;
    expect(parseDeb822(stanza('no'))).toEqual([]);
    expect(parseDeb822(stanza('yes'))).toHaveLength(1);
  });

  it('keeps an inline key with its lines', () => {
    const key = ' -----BEGIN PGP PUBLIC KEY BLOCK-----\n .\n abcd\n -----END PGP PUBLIC KEY BLOCK-----';
    const text = `Types: deb\nURIs: http://a.example\nSuites: x\nComponents: main\nSigned-By:\n${key}`;
    expect(
      parseDeb822(text)[0]
        .signedBy?.split('\n')
        .map((line) => line.trim()),
    ).toEqual(['-----BEGIN PGP PUBLIC KEY BLOCK-----', '.', 'abcd', '-----END PGP PUBLIC KEY BLOCK-----']);
  });
});

describe('the source of a suite', () => {
  const source = (uri: string, suites: string[], components = ['main']) => ({ uri, suites, components });

  it('is the first with that suite and component main, and no CD', () => {
    const sources = [
      source('cdrom:[Debian]/', ['bookworm']),
      source('http://contrib.example', ['bookworm'], ['contrib']),
      source('http://security.example', ['bookworm-security']),
      source('http://main.example', ['bookworm-updates', 'bookworm']),
      source('http://second.example', ['bookworm']),
    ];
    expect(sourceOf('bookworm', sources)?.uri).toBe('http://main.example');
    expect(sourceOf('trixie', sources)).toBeUndefined();
  });
});
